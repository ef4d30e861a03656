"""UnlearnCanvas from one command: styles and objects removed from a text-to-image model, and what is left of everything else.

    expunge bench canvas --targets red,three --methods esd,uce --seeds 3      the embedded text toy and MiniCanvas, minutes
    expunge bench canvas --model FOLDER --data FOLDER --judges FOLDER         Stable Diffusion, the public data set, two ViT judges

The protocol (arXiv 2402.11846): a target is a style, an object, or one object in one style ("red three"); for every target and
method UA on the prompts that name it, IRA on the rest of its domain, CRA in the other domain, FID and KID against real images
without it, seconds, peak memory and the storage that one request takes. We add `retrained` (never saw the target, in images
nor captions), controls that must fail (gradient ascent, fine-tuning, random weights), and 95% intervals over seeds. Images
whose prompt names the target count for UA alone. Each image has a seed of its own, made from its prompt and the set's seed.

A target of both kinds is one object in one style: FU is its UA, FR the accuracy of its neighbours (the same object in other styles,
the same style with other objects) and of the rest. Requests one after another on one model: `canvas_sequence`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.audits.base import checks as known_checks
from expunge.audits.battery import find_attacks
from expunge.audits.metrics.answer_set import Cell
from expunge.audits.metrics.exam import Exam
from expunge.audits.metrics.judges import Judge, to_uint8
from expunge.benchmarks import canvas_settings
from expunge.benchmarks.canvas import STYLES, Canvas, mini_canvas
from expunge.benchmarks.canvas_judges import canvas_judges, require_original
from expunge.benchmarks.image_models import SMALL, text_toy
from expunge.benchmarks.table_file import Section
from expunge.benchmarks.trained import cache_home
from expunge.cases import Case, requests
from expunge.cases.pictures import pictures
from expunge.errors import BadData, BadSetting
from expunge.methods import find
from expunge.records.compare import MethodSpec, compare
from expunge.records.comparison import Comparison
from expunge.tasks.denoiser import Denoiser
from expunge.tasks.sampling import Sampling

CHECKS = ("generation_accuracy", "generation_answers", "image_distance", "image_drift", "storage")
METHODS = "grad_ascent,fine_tune,salun_generation,esd,concept_ablation,uce"
SAMPLING = Sampling(20, 3.0)
ROWS = 200
"""Plain training digits whose images in every style are a case's data; the original was trained on all 1,347."""


@dataclass(frozen=True)
class Bench:
    """A benchmark's pieces. original, retrained: seed -> model, (seed, target's words) -> model or None where there is none.

    canvas, unseen: training and test images with their styles and objects. caption: (style, object, word) -> prompt.
    """

    original: Callable[[int], Denoiser]
    retrained: Callable[[int, str], Denoiser | None]
    canvas: Canvas
    unseen: Canvas
    judges: tuple[Judge, ...]
    features: Any
    feature_name: str
    sampling: Sampling = SAMPLING
    answer_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    cache: Path | None = None
    floor: float = 0.97
    base: float | None = None
    """Least judged accuracy of the original, before any table is made; None: of the testbed card; 0: none is asked for."""
    words: Mapping[str, Sequence[str]] = field(default_factory=lambda: STYLES)
    """Style -> its words; the first is the one methods are told of."""

    def target(self, text: str) -> dict[str, str]:
        """domain -> name, of `red`, `three` or `red three`; any word of a style means it."""
        found: dict[str, str] = {}
        for word in _concepts(text, self.canvas):
            domain, index = self.canvas.domain(word)
            if domain in found:
                raise BadSetting(
                    f"expected one style, one object, or one of each, found two {domain}s in '{text}'; use two targets"
                )
            found[domain] = (self.canvas.style_names if domain == "style" else self.canvas.object_names)[index]
        return {domain: found[domain] for domain in ("style", "object") if domain in found}

    def cells(self, target: Mapping[str, str]) -> tuple[Cell, ...]:
        """Every style with every object in the style's first word; the target's style in its other words as well."""
        found = []
        for style, name in enumerate(self.canvas.style_names):
            for object, other in enumerate(self.canvas.object_names):
                shows = {"style": name, "object": other}
                for word in range(len(self.words[name])):
                    cell = Cell(self.canvas.caption(style, object, word), shows, word)
                    if word == 0 or ("style" in target and cell.holds(target)):
                        found.append(cell)
        return tuple(found)

    def exam(self, target: Mapping[str, str], seeds: Sequence[int] | None = None) -> Exam:
        real = _matching(self.unseen, target, False)
        return Exam(
            self.cells(target), target, self.judges, tuple(seeds or self.answer_seeds), self.sampling, self.features,
            self.feature_name, to_uint8(real), self.floor, self.cache,
        )  # fmt: skip

    def case(self, text: str, seed: int = 0, model: Denoiser | None = None, gone: Sequence[str] = ()) -> Case:
        """The request to forget a target. gone: targets of earlier requests, whose rows are out of the data."""
        target, model = self.target(text), model or self.original(seed)
        data, test = (self._table(model, part, target, gone) for part in (self.canvas, self.unseen))
        wanted, exam = requests.where("target", "==", 1), self.exam(target)
        return Case(
            model, data, wanted, task="diffusion", test=test, exam=exam, seed=seed, notes={"exam": exam.describe()},
            name="canvas-" + text.replace(" ", "-"),
        )  # fmt: skip

    def _table(self, model: Denoiser, canvas: Canvas, target: Mapping[str, str], gone: Sequence[str]) -> Any:
        keep = torch.ones(len(canvas), dtype=torch.bool)
        for text in gone:
            keep &= ~_mask(canvas, self.target(text))
        canvas = replace(canvas, images=canvas.images[keep], styles=canvas.styles[keep], objects=canvas.objects[keep])
        asked = _mask(canvas, target)
        # what is to go is named in the words that methods are told; what stays, in all of its words in turn
        prompts = [
            canvas.caption(s, o, 0 if a else i % len(self.words[canvas.style_names[s]]))
            for i, (s, o, a) in enumerate(
                zip(canvas.styles.tolist(), canvas.objects.tolist(), asked.tolist(), strict=True)
            )
        ]
        return pictures(
            model, canvas.images, prompts=prompts, style=canvas.styles, object=canvas.objects, target=asked.long()
        )


def _concepts(text: str, canvas: Canvas) -> list[str]:
    """The words of a target; a style of several words is one of them."""
    known = {*canvas.object_names, *(w for words in STYLES.values() for w in words), *canvas.style_names}
    return [text] if text in known else text.split()


def _mask(canvas: Canvas, target: Mapping[str, str]) -> Tensor:
    """(N,) bool rows that show the target."""
    keep = torch.ones(len(canvas), dtype=torch.bool)
    if "style" in target:
        keep &= canvas.styles == canvas.style_names.index(target["style"])
    if "object" in target:
        keep &= canvas.objects == canvas.object_names.index(target["object"])
    return keep


def _matching(canvas: Canvas, target: Mapping[str, str], showing: bool) -> Tensor:
    return canvas.images[_mask(canvas, target) == showing]


# -- the embedded benchmark --------------------------------------------------------------------------------------------
@cache
def mini(small: bool = False, rows: int = ROWS, cached: bool = True, **settings: Any) -> Bench:
    """The text toy on MiniCanvas. small: the tests' size, which knows styles and not digits. settings: of `TextToy`."""
    toy = {**(SMALL if small else {}), **settings}
    size, objects = toy.get("size", 8), toy.get("objects", "digits")
    judges = canvas_judges(size, objects)

    @cache
    def original(seed: int) -> Denoiser:
        return Denoiser(text_toy(seed, **toy))

    @cache
    def retrained(seed: int, target: str) -> Denoiser | None:
        return Denoiser(text_toy(seed, exclude=target, **toy)) if " " not in target else None

    return Bench(
        original, retrained, mini_canvas("train", size, objects, rows), mini_canvas("test", size, objects, rows if small else None),
        (judges.style, judges.object), judges.features, f"canvas CNN, {judges.features.num_features}-d, own seed",
        cache=cache_home() / "generation" / "answers" if cached else None, floor=0.97 if objects == "digits" else 0.8,
        base=0.0 if small else None,
    )  # fmt: skip


def anchor_of(bench: Bench, target: Mapping[str, str]) -> str:
    """What stands in for a target: the first other style's word, or the first other object's name."""
    if "style" in target:
        other = next(name for name in bench.canvas.style_names if name != target["style"])
        return bench.words[other][0]
    return next(name for name in bench.canvas.object_names if name != target["object"])


def told(bench: Bench, target: Mapping[str, str]) -> tuple[str, str]:
    """(the target's words, what stands in for them), as they stand in a prompt: `red`, `plain`; `red three`, `plain three`."""
    words = bench.words[target["style"]][0] if "style" in target else ""
    other = anchor_of(bench, target)
    if "object" not in target:
        return words, other
    return (f"{words} {target['object']}", f"{other} {target['object']}") if words else (target["object"], other)


SMALL_STEPS = {"steps": 4, "epochs": 1, "batch_size": 8, "images": 8, "sampling_steps": 4}


def configured(
    bench: Bench, text: str, methods: Iterable[MethodSpec], small: bool = False, toy: bool = True
) -> list[tuple[str, dict[str, Any]]]:
    """Each method with what it must be told of the target, and (toy) with budgets of the toy's size; own settings come first."""
    target = bench.target(text)
    words, other = told(bench, target)
    shared = {"concept": words, "anchor": other, "to": f"{words} -> {other}", "guide": other}
    found = []
    for item in methods:
        name, own = (item, {}) if isinstance(item, str) else (item[0], dict(item[1])) if isinstance(item, tuple) else (
            item["name"], {k: v for k, v in item.items() if k != "name"})  # fmt: skip
        parameters = inspect.signature(find(name).function).parameters
        about = {k: v for k, v in shared.items() if k in parameters}
        if "concept" in about and "tuple" in str(parameters["concept"].annotation):
            about["concept"] = (words,)
        size = {**canvas_settings.TEXT.get(name, {}), **(SMALL_STEPS if small else {})} if toy else {}
        found.append((name, {**{k: v for k, v in size.items() if k in parameters}, **about, **own}))
    return found


def run(
    targets: Sequence[str] = ("red", "three"),
    methods: Sequence[MethodSpec] = tuple(METHODS.split(",")),
    seeds: Sequence[int] = (0,),
    *,
    bench: Bench | None = None,
    small: bool = False,
    folder: str | Path = "runs/canvas",
    attacks: bool | Sequence[str] = False,
    prompts: bool = False,
    p4d: bool = False,
    checks: Sequence[Any] = CHECKS,
    workers: int = 1,
    command: str = "",
    report: Callable[[str, int, int], None] | None = None,
    toy: bool = True,
) -> dict[str, Comparison]:
    """target -> methods x seeds beside original and retrained. Each seed has its own original and golds. An original that does not
    draw what it is asked is refused before anything runs (OriginalBelowFloor; `Bench.base`).

    attacks: the battery and UnlearnDiffAtk, and with them verdicts; or names of the battery. prompts: UnlearnDiffAtk alone, with
    its controls; p4d: the same with P4D beside it. toy: budgets of the embedded model's size.
    """
    bench = bench or mini(small)
    battery = () if attacks is False else find_attacks(None if attacks is True else attacks, "diffusion")
    names = [a.name for a in battery]
    asked: list[Any] = [name for name in names if name in known_checks("diffusion") and name != ATTACK]
    if p4d or prompts or ATTACK in names:
        asked.append({"name": ATTACK, "p4d": True} if p4d else ATTACK)
    found: dict[str, Comparison] = {}
    for text in targets:
        for seed in seeds:
            require_original(bench.exam(bench.target(text)), bench.original(seed), bench.base)
        found[text] = compare(
            lambda seed, text=text: bench.case(text, seed), configured(bench, text, methods, small, toy), seeds, floor=None,
            gold=lambda seed, text=text: bench.retrained(seed, text) or "none",
            # another seed's gold is the noise floor, so that n seeds take n trainings of golds
            second=lambda seed, text=text: bench.retrained(another(seed, seeds), text),
            checks=[*checks, *asked], attacks=attacks, workers=workers,
            folder=Path(folder) / text.replace(" ", "-"), command=command, report=report,
        )  # fmt: skip
    return found


def another(seed: int, seeds: Sequence[int]) -> int:
    """Another seed: the next of those given, or the next number."""
    own = list(seeds)
    return own[(own.index(seed) + 1) % len(own)] if len(own) > 1 else seed + 1


def control(bench: Bench, text: str, seed: int = 0) -> dict[str, float]:
    """What a network of random weights is worth: a table in which a method stands below it says nothing."""
    marks = bench.exam(bench.target(text)).marks(bench.case(text, seed).fresh(seed))
    if len(marks.domains) > 1:
        return {"ua": 100 * float(marks.unlearned().mean())}
    return {
        "ua": 100 * float(marks.unlearned().mean()), "ira": 100 * float(marks.kept(marks.domains).mean()),
        "cra": 100 * float(marks.kept(marks.other_domains).mean()) if marks.other_domains else float("nan"),
    }  # fmt: skip


def kept(folder: str | Path, seeds: Sequence[int]) -> Comparison:
    """Every run of these seeds kept in one target's folder by this and earlier commands, methods in the order they were made."""
    files = [f for seed in seeds for f in Path(folder).glob(f"*/seed{seed}/results.json")]
    if not files:
        raise BadData(
            f"expected runs of seeds {', '.join(map(str, seeds))} in {folder}, found none; run the bench first"
        )
    return Comparison.of(sorted(files, key=lambda file: file.stat().st_mtime_ns))


def section(folder: str | Path, bench: Bench, text: str, seeds: Sequence[int]) -> Section:
    """A target's section of a committed table, with the command that made each row."""
    found = kept(folder, seeds)
    made: dict[str, list[str]] = {}
    for row in found.rows():
        for command in dict.fromkeys(run.command for run in row.runs):
            made.setdefault(f"`{command}`", []).append(row.label)
    whole = Section.of(note(found, bench), table(found, control(bench, text, seeds[0])), "")
    return replace(whole, made={command: ", ".join(labels) for command, labels in made.items()})


# -- the table ---------------------------------------------------------------------------------------------------------
COLUMNS = (
    ("UA", "generation_accuracy", "ua"), ("UA, other words", "generation_accuracy", "ua_other_words"),
    ("FR near", "generation_accuracy", "ra_near"), ("FR rest", "generation_accuracy", "ra_rest"),
    ("IRA", "generation_accuracy", "ira"), ("CRA", "generation_accuracy", "cra"),
    ("worst", "generation_accuracy", "worst_retained"), ("leak", "generation_accuracy", "leak"),
    ("rejected", "generation_answers", "rejected"), ("FID", "image_distance", "fid"), ("KID", "image_distance", "kid"),
    ("storage MB", "storage", "storage"), ("ASR unattacked", "unlearn_diff_atk", "pre_asr"), ("ASR", "unlearn_diff_atk", "post_asr"),
    ("P4D", "unlearn_diff_atk", "p4d_asr"),
    ("random words", "unlearn_diff_atk", "random_prefix_asr"), ("new seeds", "unlearn_diff_atk", "new_seeds_asr"),
    ("other wordings", "unlearn_diff_atk", "other_wordings_asr"),
)  # fmt: skip
ATTACK = "unlearn_diff_atk"
"""The check whose measurements fill the columns of attacked prompts (Rob is 100 - ASR), where it was run."""


def table(
    comparison: Comparison, random: Mapping[str, float] | None = None, columns: Sequence[tuple[str, str, str]] = COLUMNS
) -> str:
    """One target's table in markdown: means over seeds, ± half a 95% t-interval; random: the control's UA, IRA and CRA."""
    known = comparison.keys()
    keys = {key[:2]: key for key in reversed(known)}  # the first of a name: `rejected` is the forget split's
    shown = [(title, keys[check, name]) for title, check, name in columns if (check, name) in keys]
    head = ["model", *(title for title, _ in shown), "seconds", "peak MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for subject in ("original", "retrained"):
        shared = comparison.shared(subject)
        if not any(key in shared for _, key in shown):
            continue
        cells = [_cell(shared.get(key)) for _, key in shown]
        lines.append("| " + " | ".join([subject, *cells, "", ""]) + " |")
    if random is not None:
        cells = [f"{random[n]:.1f}" if n in random else "" for n in (key[1] for _, key in shown)]
        lines.append("| " + " | ".join(["random weights", *cells, "", ""]) + " |")
    for row in comparison.rows():
        cells = [_cell(row.values.get(key, {}).get("unlearned")) for _, key in shown]
        cost = [_cell(row.cost("seconds"), 1), _cell(row.cost("peak_memory_mb"), 0)]
        lines.append("| " + " | ".join([row.label, *cells, *cost]) + " |")
    return "\n".join(lines) + "\n"


def _cell(summary: Any, digits: int | None = None) -> str:
    if summary is None:
        return ""
    size = abs(summary.mean)
    places = digits if digits is not None else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 4
    half = "" if summary.high is None else f" ± {summary.high - summary.mean:.{places}f}"
    return f"{summary.mean:.{places}f}{half}"


def note(comparison: Comparison, bench: Bench) -> str:
    """What a reader must know beside the numbers."""
    run = comparison.results[0]
    fid = run.find("fid")
    judges = "; ".join(str(judge) for judge in bench.judges)
    s = bench.sampling
    return (
        f"{judges}. Answers: every style with every object, {len(bench.answer_seeds)} seeds each, {s.steps} steps of the model's own "
        f"scheduler, guidance {s.guidance:g} ({s.convention}). FID and KID: {fid.note if fid else 'not measured'}. UA, IRA, CRA, leak "
        "and rejected in %; rejected: share of the target's answers that are like no real image."
    )
