"""The committed tables: every method against its baselines and `retrained`, over seeds, on real data.

    python -m expunge.benchmarks.tables digits          # memorised and class requests, 3 seeds
    python -m expunge.benchmarks.tables cifar           # a CIFAR-10 subset, small ResNet with batch norm
    python -m expunge.benchmarks.tables regression      # diabetes, and a second real set

Protocol: each seed trains its own original, gold and second gold; methods get one setting each, chosen on seed 100 by the rule
of `settings_rule` below; the table gives means with 95% t-intervals over seeds. Nothing is tuned on the gold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.benchmarks.testbed import CIFAR_RECIPE, cifar_case, diabetes_case, digits_cases, second_regression_case
from expunge.cases import Case
from expunge.engine.rundir import machine, versions
from expunge.files import write_atomic
from expunge.records.compare import compare
from expunge.records.comparison import Comparison
from expunge.records.terminal import markdown

SETTINGS_RULE = (
    "settings: one per method, chosen on seed 100 as the largest forgetting whose retain utility stays within 2% of the "
    "original's (validation by retain rows and forget loss only, never by the gold)"
)


@dataclass(frozen=True)
class Study:
    """case(seed) -> Case; methods: (name, settings); note: what a reader must know beside the numbers."""

    case: Callable[[int], Case]
    methods: dict[str, dict[str, Any]]
    note: str = ""
    checks: tuple[str, ...] | None = None
    audit: dict[str, Any] = field(default_factory=dict)


DIGITS_MEMORISED: dict[str, dict[str, Any]] = {
    "fine_tune": {"lr": 0.02},
    "grad_ascent": {"lr": 0.002},
    "neggrad_plus": {"lr": 0.01, "epochs": 5},
    "random_labels": {"lr": 0.02, "batch_size": 64},
    "salun": {"lr": 0.02, "batch_size": 64},
    "l1_sparse": {"lr": 0.02, "gamma": 2e-3},
    "scrub": {"lr": 0.01},
    "bad_teacher": {"lr": 1e-3, "epochs": 5},
    "npo": {"lr": 0.02},
    "boundary_shrink": {"lr": 2e-3},
    "amnesiac_relabel": {"lr": 1e-3},
    "ssd": {},
    "influence": {},
    "fisher": {},
}
DIGITS_CLASS: dict[str, dict[str, Any]] = {**DIGITS_MEMORISED, "ssd": {"alpha": 20.0}, "unsir": {}, "laf": {}}
CIFAR: dict[str, dict[str, Any]] = {
    name: {} for name in ("fine_tune", "grad_ascent", "neggrad_plus", "random_labels", "salun", "l1_sparse", "scrub",
                          "bad_teacher", "npo", "ssd")
}  # fmt: skip
REGRESSION: dict[str, dict[str, Any]] = {
    "fine_tune": {"lr": 1e-3}, "gaussian_amnesiac": {}, "blindspot": {},
}  # fmt: skip

STUDIES: dict[str, dict[str, Study]] = {
    "digits": {
        "memorised": Study(lambda s: digits_cases(s, which="memorised")["memorised"], DIGITS_MEMORISED,
                           "60 of 600 training labels are wrong; the request names these rows."),
        "class": Study(lambda s: digits_cases(s, wrong=0, which="class")["class"], DIGITS_CLASS, "All rows of class 3."),
    },
    "cifar": {
        "class": Study(lambda s: cifar_case(s, "class"), CIFAR, "Class 3 (cat) of a CIFAR-10 subset, JPEG-encoded."),
        "memorised": Study(lambda s: cifar_case(s, "memorised"), CIFAR, "5% of the subset's labels are wrong."),
    },
    "regression": {
        "diabetes": Study(diabetes_case, REGRESSION, "Rows with progression below 80 (y/10 < 8)."),
        "second": Study(second_regression_case, REGRESSION),
    },
}  # fmt: skip


def run(name: str, seeds: int = 3, workers: int = 2, folder: Path | None = None, out: Path | None = None,
        only: str | None = None) -> dict[str, Comparison]:  # fmt: skip
    """Run a study's comparisons and write its table to benchmarks-results/<name>.md."""
    folder = folder or Path("runs/tables") / name
    out = out or Path("benchmarks-results") / f"{name}.md"
    command = f"python -m expunge.benchmarks.tables {name} --seeds {seeds} --workers {workers}"
    found, parts, start = {}, [], time.perf_counter()
    for request, study in STUDIES[name].items():
        if only and request != only:
            continue
        began = time.perf_counter()
        found[request] = compare(
            study.case, study.methods.items(), range(seeds), workers=workers, folder=folder / request, command=command,
            report=lambda text, done, total, request=request: print(f"{request}: {done}/{total} {text}", file=sys.stderr),
            checks=study.checks, **study.audit,
        )  # fmt: skip
        parts.append(f"## {request}\n\n{study.note}\n\n{markdown(found[request])}\n{time.perf_counter() - began:.0f} s\n")
    write_atomic(out, heading(name, command, time.perf_counter() - start) + "\n".join(parts))
    return found


def heading(name: str, command: str, seconds: float) -> str:
    """What a committed table says of itself: command, versions, machine."""
    where = machine()
    told = ", ".join(f"{k} {v}" for k, v in versions().items())
    return (
        f"# {name}\n\nMade by `{command}` in {seconds:.0f} s.\n{told}.\n"
        f"{where['cores']} cores ({where['processor']}), GPU: {where['gpu'] or 'none'}, {where['threads']} torch thread(s) "
        "per process.\nMeans over seeds, ± half a 95% t-interval; cost is time over retraining's.\n\n"
    )


def main(arguments: list[str] | None = None) -> None:
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m expunge.benchmarks.tables", description=__doc__)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only")
    chosen = parser.parse_args(arguments)
    for request, comparison in run(chosen.study, chosen.seeds, chosen.workers, only=chosen.only).items():
        print(request)
        print(markdown(comparison))


if __name__ == "__main__":
    main()

__all__ = ["CIFAR_RECIPE", "STUDIES", "Study", "heading", "main", "run"]
