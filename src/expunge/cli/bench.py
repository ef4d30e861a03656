"""`expunge bench`: a published benchmark on the embedded model or on one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from expunge.cli import show
from expunge.cli.work import method_specs, seed_numbers
from expunge.errors import BadSetting, nearest

DEFAULT_METHODS = "grad_ascent,grad_diff,npo,simnpo,wga,rmu,idk"
KNOWN = ("tofu", "muse")


def bench(
    which: str, methods: str, *, split: str, seeds: str, model: str | None, retrained: str | None, second: str | None,
    forget: Path | None, retain: Path | None, attacks: bool, samples: int, show_forgotten: bool, workers: int, out: Path | None,
) -> None:  # fmt: skip
    """Run it, print its table, and say where the report is."""
    from expunge.records.terminal import comparison_table

    if which not in KNOWN:
        raise BadSetting(f"expected a benchmark, one of {', '.join(KNOWN)}, found '{which}'.{nearest(which, KNOWN)}")
    folder = out or Path("runs") / which
    chosen, numbers = method_specs(methods or DEFAULT_METHODS), seed_numbers(seeds)
    told = [f"expunge bench {which} --methods {methods or DEFAULT_METHODS} --seeds {seeds}"]
    told += [f"--split {split}"] if split else []
    told += ["--model FOLDER"] if model else []
    shared: dict[str, Any] = {
        "folder": folder, "attacks": None if attacks else False, "workers": workers, "command": " ".join(told),
    }  # fmt: skip
    with show.Report() as report:
        if which == "tofu":
            from expunge.benchmarks import tofu

            own = {"model": model, "retrained": retrained, "second": second}
            where = split or ("forget10" if model else "nano")
            comparison = tofu.run(chosen, where, numbers, report=report, **own, **shared)
        else:
            from expunge.benchmarks import muse

            comparison = muse.run(chosen, numbers, forget=forget, retain=retain, model=model, report=report, **shared)
        if samples:
            from expunge.benchmarks import samples as answers

            page = answers.write(
                folder, which, split, numbers[0], samples, show_forgotten, model=model, retrained=retrained
            )
    show.out().print(comparison_table(comparison))
    show.out().print(f"report: {escape(str(folder / 'report.html'))}", soft_wrap=True)
    if samples:
        show.out().print(f"samples: {escape(str(page))}", soft_wrap=True)
