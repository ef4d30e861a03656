"""One setting per method for the tables, chosen without looking at the gold: `python -m expunge.benchmarks.tune digits`.

Each method gets the same grid of four step sizes (one-shot edits: four strengths) on an original of a seed that no table uses,
and for CIFAR-10 on other rows too.
The rule reads only what an owner has before retraining:

    cost = |m(forget) - target| + 10 * max(0, 0.97 - retain utility / original's) + |AUC(forget vs holdout) - 1/2|

m is the mean forget score; its target is the holdout's (rows never seen, of the forget kind), and 0 for a whole class, whose
holdout the original knows as well.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import numpy as np

from expunge.audits.attacks.membership import auc
from expunge.audits.subjects import Subjects
from expunge.cases import Case
from expunge.errors import ExpungeError
from expunge.methods.outcome import unlearn

SEED = 100

GRIDS: dict[str, dict[str, list[Any]]] = {
    "ssd": {"alpha": [5.0, 10.0, 20.0, 40.0]},
    "influence": {"alpha": [1.0, 3.0, 10.0, 30.0]},
    "fisher_forgetting": {"alpha": [1e-8, 1e-7, 1e-6, 3e-6]},
    "l1_sparse": {"gamma": [1e-3, 2e-3, 4e-3, 8e-3]},
    "unsir": {"impair_lr": [0.003, 0.01, 0.02, 0.05]},
    "laf": {"lr_unlearn": [5e-5, 2e-4, 5e-4, 1e-3]},
}
"""Methods whose strength is not a step size."""


def cost(case: Case, model: Any, original: dict[str, float]) -> float:
    """The rule above."""
    subjects = Subjects(case, case.model, model)
    forget, holdout = subjects.passed("unlearned", "forget"), subjects.passed("unlearned", "holdout")
    whole_class = case.request.describe()["kind"] == "class"
    target = 0.0 if whole_class else float(holdout.forget_score.mean())
    kept = subjects.evaluate("unlearned", "retain")[case.task.utility] / original[case.task.utility]
    area = auc(forget.signals["margin"], holdout.signals["margin"])
    return abs(float(forget.forget_score.mean()) - target) + 10 * max(0.0, 0.97 - kept) + abs(area - 0.5)


def choose(case: Case, name: str, fixed: dict[str, Any], grid: dict[str, list[Any]]) -> tuple[dict[str, Any], float]:
    """The settings of the grid with the least cost."""
    original = case.task.evaluate(case.model, case.split("retain").batches())
    found = []
    ((key, values),) = grid.items()
    for value in values:
        try:
            outcome = unlearn(case, name, seed=SEED, floor=None, **{**fixed, key: value})
            found.append(({**fixed, key: value}, cost(case, outcome.model, original)))
            print(f"  {name} {key}={value}: {found[-1][1]:.3f}", file=sys.stderr, flush=True)
        except ExpungeError as error:
            print(f"{name} {key}={value}: {error}", file=sys.stderr)
    return min(found, key=lambda pair: pair[1] if np.isfinite(pair[1]) else 1e9)


def main(arguments: list[str] | None = None) -> None:
    import torch

    from expunge.benchmarks.tables import STUDIES

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(prog="python -m expunge.benchmarks.tune", description=__doc__)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--only")
    parser.add_argument("--methods", default="")
    chosen = parser.parse_args(arguments)
    for request, study in STUDIES[chosen.study].items():
        if chosen.only and request != chosen.only:
            continue
        case = (study.tuning or study.case)(SEED)
        for name, settings in study.methods.items():
            if chosen.methods and name not in chosen.methods.split(","):
                continue
            grid = study.grids.get(name) or GRIDS.get(name) or {"lr": study.rates.get(name, [0.003, 0.01, 0.03, 0.1])}
            fixed = {k: v for k, v in settings.items() if k not in grid}
            best, value = choose(case, name, fixed, grid)
            print(f"{request:10s} {name:18s} {value:.3f} {best}", flush=True)


if __name__ == "__main__":
    main()
