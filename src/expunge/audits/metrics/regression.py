"""Regression: errors on the kept and the forgotten range, and how the predictions on the forget rows are distributed.

    W1  = 1-D empirical Wasserstein distance between the predictions of a model and of `retrained` on the forget rows
    gap = |f_U(x) - f_R(x)| / |y|  on the forget rows

Deep Regression Unlearning (arXiv 2210.08196). When a whole range of targets is forgotten, the retrained model predicts
the edge of the kept range, so a small W1 does not mean random output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import wasserstein_distance

from expunge.audits.base import Measurement, check

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

SOURCE = "Deep Regression Unlearning, arXiv 2210.08196"


def prediction_distance(first: np.ndarray, second: np.ndarray) -> float:
    """W1 between two samples of predictions (n,), in the target's unit; the mean over columns for (n, D)."""
    first, second = (np.asarray(part, dtype=np.float64).reshape(len(part), -1) for part in (first, second))
    return float(np.mean([wasserstein_distance(first[:, d], second[:, d]) for d in range(first.shape[1])]))


def relative_gaps(first: np.ndarray, second: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """(n,) |first - second| / |answer|, the mean over columns for (n, D); answers of 0 are left out as NaN."""
    first, second, answers = (
        np.asarray(part, dtype=np.float64).reshape(len(part), -1) for part in (first, second, answers)
    )
    return (np.abs(first - second) / np.where(answers == 0, np.nan, np.abs(answers))).mean(1)


@check(
    "error",
    unit="target",
    direction="match",
    range=(0.0, None),
    needs=("retrained", "forget"),
    kinds=("regression",),
    source=SOURCE,
)
def error(subjects: Subjects) -> list[Measurement]:
    """Mean absolute error on the kept range (test), the forgotten range (holdout) and the forget rows."""
    found = []
    for split, name in (("test", "error_kept"), ("holdout", "error_forgotten"), ("forget", "error_forget_rows")):
        if subjects.unmet(split) is None:
            measured = subjects.measure(lambda subject, split=split: -subjects.signal(subject, split, "error"))
            direction = "lower" if split == "test" else "match"
            found.append(error.measurement(measured, name=name, split=split, direction=direction))
    return found


@check(
    "wasserstein",
    unit="target",
    direction="lower",
    range=(0.0, None),
    needs=("retrained", "forget"),
    kinds=("regression",),
    source=SOURCE,
)
def wasserstein(subjects: Subjects) -> list[Measurement]:
    """W1 of the predictions on the forget rows from the retrained model's."""
    gold = subjects.predictions("retrained", "forget")

    def pairs(subject: str) -> np.ndarray:
        # Rows of both models are resampled together: they are the same examples.
        return np.stack(
            [subjects.predictions(subject, "forget").reshape(len(gold), -1), gold.reshape(len(gold), -1)], 1
        )

    measured = subjects.measure(pairs, lambda rows: prediction_distance(rows[:, 0], rows[:, 1]))
    return [wasserstein.measurement(measured, split="forget")]


@check(
    "relative_gap",
    direction="lower",
    range=(0.0, None),
    needs=("retrained", "forget"),
    kinds=("regression",),
    source=SOURCE,
)
def relative_gap(subjects: Subjects) -> list[Measurement]:
    """Median of |prediction - retrained's prediction| / |target| on the forget rows."""
    gold, answers = subjects.predictions("retrained", "forget"), subjects.answers("forget")

    def gaps(subject: str) -> np.ndarray:
        found = relative_gaps(subjects.predictions(subject, "forget"), gold, answers)
        return found[np.isfinite(found)]

    dropped = int((answers.reshape(len(answers), -1) == 0).any(1).sum())
    if dropped == len(answers):
        return []
    measured = subjects.measure(gaps, lambda values: float(np.median(values)))
    note = f"{dropped} rows with target 0 left out" if dropped else ""
    return [relative_gap.measurement(measured, split="forget", note=note)]
