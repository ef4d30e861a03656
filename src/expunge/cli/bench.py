"""`expunge bench`: a published benchmark on the embedded model or on one's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from expunge.cases import Case
from expunge.cli import show
from expunge.cli.work import method_specs, seed_numbers
from expunge.errors import BadSetting, nearest

DEFAULT_METHODS = "grad_ascent,grad_diff,npo,simnpo,wga,rmu,idk"
KNOWN = ("tofu", "muse", "canvas")
GOLDS = {"tofu": "nano", "muse": "muse"}
"""Where in the cache the retrained models of the embedded testbeds, and of one's own texts, are kept."""


def bench(
    which: str, methods: str, *, split: str, seeds: str, model: str | None, retrained: str | None, second: str | None,
    forget: Path | None, retain: Path | None, folds: int, attacks: str, samples: int, show_forgotten: bool, workers: int, out: Path | None,
    **canvas: Any,
) -> None:  # fmt: skip
    """Run it, print its table, and say where the report is."""
    from expunge.records.terminal import comparison_table

    if which not in KNOWN:
        raise BadSetting(f"expected a benchmark, one of {', '.join(KNOWN)}, found '{which}'.{nearest(which, KNOWN)}")
    folder = out or Path("runs") / which
    chosen_attacks = attacks_of(attacks, "diffusion" if which == "canvas" else "language")
    if which == "canvas":
        from expunge.cli import canvas as pictured

        pictured.bench(
            methods, seed_numbers(seeds), folder, model=model, retrained=retrained, second=second, attacks=chosen_attacks,
            told_attacks=attacks, samples=samples, show_forgotten=show_forgotten, workers=workers, **canvas,
        )  # fmt: skip
        return
    chosen, numbers = method_specs(methods or DEFAULT_METHODS), seed_numbers(seeds)
    told = [f"expunge bench {which} --methods {methods or DEFAULT_METHODS} --seeds {seeds}"]
    told += [f"--split {split}"] if split else []
    told += ["--model FOLDER"] if model else []
    told += [f"--attacks {attacks}"] if attacks != "default" else []
    shared: dict[str, Any] = {
        "folder": folder, "attacks": chosen_attacks, "workers": workers, "command": " ".join(told),
    }  # fmt: skip
    from expunge.benchmarks.trained import cache_home

    with show.Report() as report:
        if which == "tofu":
            from expunge.benchmarks import tofu

            own: dict[str, Any] = {"model": model, "retrained": retrained, "second": second}
            where = split or ("forget10" if model else "nano")
            comparison = tofu.run(chosen, where, numbers, report=report, **own, **shared)
            case = (lambda: tofu.tofu_case(model, where)) if model else lambda: tofu.nano(where)(numbers[0])
        else:
            from expunge.benchmarks import muse

            texts = {"data": canvas["data"], "forget": forget, "retain": retain, "model": model}
            own = {**texts, "retrained": retrained, "second": second}
            comparison = muse.run(chosen, numbers, report=report, **own, **shared)
            case = lambda: muse.the_case(**texts)(numbers[0])  # noqa: E731
            folded = lambda: muse.the_case(**texts, folded=True)(numbers[0])  # noqa: E731
        grown = (
            _scaling(folder, folded(), chosen, folds, numbers[0], model is None, retrained, report)
            if which == "muse" and folds
            else None
        )
        gold = Path(folder) / ".golds" if which == "tofu" and model else cache_home() / GOLDS[which]
        page = _samples(folder, case(), numbers[0], samples, show_forgotten, retrained or gold) if samples else None
    show.out().print(comparison_table(comparison))
    if grown is not None:
        show.out().print(grown)
    show.out().print(f"report: {escape(str(folder / 'report.html'))}", soft_wrap=True)
    if page is not None:
        show.out().print(f"samples: {escape(str(page))}", soft_wrap=True)


def attacks_of(text: str, kind: str) -> bool | list[str]:
    """What `--attacks` means for every benchmark: `none` is False; `default` True, the battery of the kind of model; `all` the
    names of every attack that the kind has; else the names given, with commas between. An unknown name is refused."""
    from expunge.audits.battery import BY_NAME, default_attacks, find_attacks

    words = [word.strip() for word in text.split(",") if word.strip()]
    if words in (["none"], ["default"]):
        return words == ["default"]
    every = [attack.name for attack in (*default_attacks(kind), *BY_NAME.get(kind, ()))]
    if words == ["all"]:
        return every
    known = ("all", "default", "none", *every)
    unknown = [word for word in words if word not in every]
    if unknown or not words:
        found = f"'{unknown[0]}'" if unknown else "no name"
        hint = nearest(unknown[0], known) if unknown else ""
        raise BadSetting(
            f"expected --attacks all, default, none, or names among {', '.join(every)} with commas between, found {found}.{hint} "
            "`all`, `default` and `none` stand alone"
        )
    return [attack.name for attack in find_attacks(words, kind)]


def _samples(folder: Path, case: Case, seed: int, count: int, show_forgotten: bool, retrained: str | Path) -> Path:
    """Answers of the original, of every method's model of one seed, and of the retrained one, side by side.

    retrained: the user's folder or hub id (str); or the folder where the audit kept the one that it trained (Path)."""
    from expunge.audits.golds import retrain
    from expunge.cases.loading import load_model
    from expunge.parts.guarded import load_saved
    from expunge.records.samples import write_samples

    models = {"original": case.model}
    for run in sorted(folder.glob(f"*/seed{seed}/model")):
        models[run.parent.parent.name] = load_saved(run, copy.deepcopy(case.model))
    if isinstance(retrained, str):
        models["retrained"] = load_model(retrained)
    elif case.recipe is not None:  # the audit's own, read from where it is kept
        gold = retrain(case, seed + 1001, retrained).model
        assert gold is not None  # a recipe makes a model
        models["retrained"] = gold
    return write_samples(folder / "samples.html", case, models, count, show_forgotten=show_forgotten, seed=seed)


def _scaling(
    folder: Path,
    case: Case,
    methods: list[tuple[str, dict[str, Any]]],
    folds: int,
    seed: int,
    embedded: bool,
    retrained: str | None,
    report: Any,
) -> Table:
    """MUSE's scalability and sustainability of every method as one table, and as scaling.json in the folder."""
    import json

    from expunge.benchmarks import muse, tofu
    from expunge.cases.loading import load_model
    from expunge.files import write_atomic

    gold = None if retrained is None else load_model(retrained)
    title = f"{case.name}: {folds} folds, 95% intervals; in brackets the retrained model"
    table = Table("method", "", "after", *muse.HEADINGS.values(), title=title, title_justify="left")
    found = {}
    for name, settings in tofu.configured(methods, tofu.NANO_SETTINGS if embedded else {}):
        found[name] = muse.scaling(case, name, settings, seed, folds, gold, report=report)
        for what, steps in found[name].items():
            for step in steps:
                table.add_row(
                    name, what, str(step["step"]), *(muse.spelled(step["scores"][key]) for key in muse.HEADINGS)
                )
    write_atomic(folder / "scaling.json", json.dumps(found, indent=1) + "\n")
    return table
