"""A digit out of the class-conditional toy: erasers, and the generic methods that know nothing of images, beside `retrained`.

    python -m expunge.benchmarks.class_erasers                          # three seeds, all parts
    python -m expunge.benchmarks.class_erasers erasers --seeds 0 --only esd    # one part: erasers, distillation, generic

Digit 0 is to go, and what stands in for it is 1. The judge is a support vector machine of real digits. Settings are the toys'
(`canvas_settings.CLASS`); for the generic methods a small grid around where they begin to move the class. Ablations of the erasers:
SalUn with every weight free (random labels without a mask), DoCo without surgery, SFD without its forget terms, and from a first stage
that only distils. A generator of one call per image stands beside its teacher at one step and at fifty.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from expunge.audits.metrics import images
from expunge.audits.metrics.answer_set import answer_set
from expunge.benchmarks import canvas_settings, table_file
from expunge.benchmarks.canvas_judges import require_original
from expunge.benchmarks.embedded import Embedded
from expunge.benchmarks.measuring import options, spelled
from expunge.benchmarks.tables import heading
from expunge.benchmarks.unlearncanvas import COLUMNS as SHARED
from expunge.benchmarks.unlearncanvas import another, table
from expunge.files import write_atomic
from expunge.parts.guarded import load_saved
from expunge.records.compare import compare
from expunge.records.sheets import Sheet, write_sheet

NAME = "class_erasers"
CHECKS = ("generation_accuracy", "generation_answers", "image_distance", "storage")
SAID = {"distillation": "; SFD draws in one step without guidance"}
COLUMNS = (*SHARED, ("one other", "generation_answers", "substitute"), ("entropy", "generation_answers", "entropy"))
Row = tuple[str, dict[str, Any]]

ERASERS: tuple[Row, ...] = (
    ("grad_ascent", {"optimizer": "adam", "lr": 1e-4, "epochs": 10, "batch_size": 32}),
    ("fine_tune", {"lr": 0.01, "epochs": 2, "batch_size": 64}),
    ("salun_generation", {"to": "1"}), ("salun_generation", {"to": "1", "density": 1.0}), ("esd", {}),
    ("erasediff", {"to": "another"}), ("scissorhands", {"to": "1"}), ("selective_amnesia", {}),
    ("doco", {"concept": "0", "anchor": "1"}), ("doco", {"concept": "0", "anchor": "1", "surgery": "none"}),
)  # fmt: skip
"""What an eraser must be told of the class, and its ablations; the rest of its settings is the toys'."""
DISTILLATION: tuple[Row, ...] = (
    ("sfd", {}), ("sfd", {"steps": 50}), ("sfd", {"distil_steps": 150, "steps": 50}),
    ("sfd", {"g_f": 0.0, "w_f": 0.0, "steps": 100}),
)  # fmt: skip
GENERIC: tuple[Row, ...] = (
    ("ssd", {"alpha": 10.0}), ("ssd", {"alpha": 15.0}), ("ssd", {"alpha": 20.0}),
    ("npo", {"optimizer": "adam", "lr": 1e-4, "beta": 0.1, "epochs": 2, "batch_size": 64}),
    ("npo", {"optimizer": "adam", "lr": 2e-4, "beta": 1.0, "epochs": 2, "batch_size": 32}),
    ("scrub", {"optimizer": "adam", "alpha": 1.0, "lr": 2.5e-4, "epochs": 2, "msteps": 1}),
    ("scrub", {"optimizer": "adam", "alpha": 1.0, "lr": 5e-4, "epochs": 2, "msteps": 2}),
    ("grad_diff", {"lr": 2e-4, "epochs": 3}), ("grad_diff", {"lr": 5e-4, "epochs": 3}),
    ("neggrad_plus", {"lr": 0.05, "alpha": 0.9, "epochs": 2}),
    ("salun", {"lr": 0.1, "epochs": 2, "batch_size": 64}), ("salun", {"lr": 0.03, "epochs": 10, "batch_size": 64}),
)  # fmt: skip


PARTS = {"erasers": ERASERS, "distillation": DISTILLATION, "generic": GENERIC}


def rows(part: str, only: Sequence[str] = ()) -> list[Row]:
    """Methods with their settings. only: names of methods."""
    told = {} if part == "generic" else canvas_settings.CLASS
    return [(name, {**told.get(name, {}), **own}) for name, own in PARTS[part] if not only or name in only]


def teachers(toy: Callable[[int], Embedded], seeds: Sequence[int], steps: Sequence[int] = (1, 50)) -> list[str]:
    """The original, guided, at one DDIM step and at fifty, in words: accuracy on the nine kept classes in %, and FID as above."""
    lines = []
    for count in steps:
        kept, distances = [], []
        for seed in seeds:
            exam, model = toy(seed).exam(), toy(seed).case.model
            exam = replace(exam, sampling=replace(exam.sampling, steps=count))
            answers = exam.answers(model)
            kept.append(100 * float(exam.marked(answers).kept(("digit",)).mean()))
            others = torch.tensor([not cell.holds(exam.target) for cell in answers.cells])[answers.cell]
            assert exam.features is not None and exam.reference is not None
            drawn = answers.images[others & answers.finite]
            distances.append(images.corrected(images.fid, exam.features, exam.reference, drawn)[0])
        ira, fid = (sum(values) / len(values) for values in (kept, distances))
        lines.append(f"The original in {count} guided step{'s' * (count > 1)}: IRA {ira:.1f}, FID {fid:.1f}")
    return lines


def draw(toy: Embedded, folder: Path) -> Path:
    """pictures.png in the folder: every digit by the original, by every kept model of this seed, and by `retrained`, same noise."""
    exam = toy.exam()
    models = {"original": toy.case.model}
    for run in sorted(folder.glob(f"*/seed{toy.seed}/model")):
        models[run.parent.parent.name] = load_saved(run, copy.deepcopy(toy.case.model))
    models["retrained"] = toy.retrained()
    cells, seeds = exam.cells, exam.seeds[:2]
    columns = {
        name: answer_set(model, cells, seeds, exam.sampling).images.unflatten(0, (len(cells), len(seeds)))
        for name, model in models.items()
    }
    sheet = Sheet("every digit", tuple(str(cell.asks) for cell in cells), columns)
    return write_sheet(folder / "pictures.png", sheet)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(NAME, __doc__)
    parser.add_argument(
        "parts", nargs="*", default=list(PARTS), metavar="part", help=f"of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="names of methods, with commas between")
    parser.add_argument("--answers", type=int, default=20, help="images a class")
    parser.add_argument("--small", action="store_true", help="the tests' model")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"small": True, "sampling_steps": 4} if given.small else {}
    settings["answers"] = given.answers
    command = spelled(NAME, arguments)

    def toy(seed: int) -> Embedded:
        return Embedded(label=0, seed=seed, settings=settings)

    for seed in given.seeds:
        require_original(toy(seed).exam(), toy(seed).case.model, 0 if given.small else None)
    for part in given.parts:
        found = compare(
            lambda seed: toy(seed).case, rows(part, [name for name in given.only.split(",") if name]), given.seeds, floor=None,
            gold=lambda seed: toy(seed).retrained(), second=lambda seed: toy(another(seed, given.seeds)).retrained(),
            checks=CHECKS, attacks=False, workers=given.workers, command=command, folder=Path("runs") / NAME / part,
            report=lambda text, done, total: print(f"{text} ({done}/{total})", flush=True),
        )  # fmt: skip
        exam, fid = toy(given.seeds[0]).exam(), found.results[0].find("fid")
        about = (
            f"Digit 0 to go; {exam.judges[0]}; {len(given.seeds)} seeds, {len(exam.seeds)} images a class, {exam.sampling.steps} steps, "
            f"guidance 1 in the (1 + w) convention{SAID.get(part, '')}. IRA is the accuracy on the nine kept classes; UA, IRA, leak and "
            "rejected in %; rejected: share of the target's answers that are like no real digit; one other: share that shows the one other "
            f"digit seen most; entropy: the judge's, in nats. FID and KID: {fid.note if fid else ''}."
        )
        if part == "distillation":
            about += "".join(f" {line}." for line in teachers(toy, given.seeds))
        section = table_file.Section.of(about, table(found, columns=COLUMNS), f"`{command}`")
        print(section)
        print(f"pictures: {draw(toy(given.seeds[0]), Path('runs') / NAME / part)}")
        if given.out:
            file = Path(given.out) / f"{NAME}.md"
            kept = table_file.read(file.read_text("utf-8")) if file.exists() else {}
            write_atomic(
                file,
                table_file.write(
                    heading(NAME), {p: {**kept, part: section}[p] for p in PARTS if p in {**kept, part: section}}
                ),
            )


if __name__ == "__main__":
    main()
