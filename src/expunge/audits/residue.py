"""The verdict's numbers, each with a 95% interval, as functions of arrays.

    m(X)   mean forget score on the forget set             O original, U unlearned, R retrained, R' a second retrained
    r(U)   (m(U) - m(R)) / (m(O) - m(R))                   residue: 1 for O, 0 for R
    r_a(U) (m(a(U)) - m(a(R))) / (m(O) - m(R))             after attack a: what the attack teaches falls out
    g(U)   AUC(U) - AUC(R), forget against holdout         membership residue; below 0 where the forget set is too bad
    d(U)   (u(R) - u(U)) / |u(R) - u(untrained)|           utility loss

Departure in one point, named because the card does not settle it: where an attack scores a part of the forget set,
m(O) and m(R) of r_a are taken on that part.

Intervals are over examples (bootstrap of the same rows for all models together, so that what they share falls out),
and over seeds by t where there are at least three; the wider one counts. A bootstrap of scores that all agree has no
width, however few they are. What is seen in none of n examples can still sit in a share z^2 / (n + z^2) of their kind
(Wilson, at zero of n), each as large as the largest difference between O and R: no interval of r and r_a is narrower
than that to either side, nor one of g than the share alone. So a handful of examples settles nothing in favour of
"removed".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import t as student

from expunge.audits.attacks.budget import Attacked
from expunge.audits.attacks.membership import auc
from expunge.audits.metrics.intervals import Z95, widening
from expunge.errors import BadData
from expunge.seeds import numpy_generator

RESAMPLES = 1000
CHUNK = 50


@dataclass(frozen=True)
class Membership:
    """Membership signals of one model, higher = more likely a member: forget (n,), holdout (h,)."""

    forget: np.ndarray
    holdout: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """What one seed measured. All arrays over the forget set are in one order of rows.

    original, unlearned, retrained, second: (n,) forget scores. attacks: by name. membership: subject -> signals, with
    at least `unlearned` and `retrained`. utility: subject -> (t,) values whose mean is the utility, with at least
    `unlearned`, `retrained` and `untrained`. skipped: attack -> why it was not run.
    """

    original: np.ndarray
    unlearned: np.ndarray
    retrained: np.ndarray
    second: np.ndarray
    attacks: Mapping[str, Attacked] = field(default_factory=dict)
    membership: Mapping[str, Membership] | None = None
    utility: Mapping[str, np.ndarray] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {name: len(getattr(self, name)) for name in ("original", "unlearned", "retrained", "second")}
        if len(set(sizes.values())) != 1 or not sizes["original"]:
            raise BadData(
                f"expected forget scores of the same rows for all four models, at least one, found {sizes}; "
                "score all of them"
            )
        for name in sizes:
            if not np.isfinite(getattr(self, name)).all():
                raise BadData(
                    f"expected finite forget scores, found others for {name}; check that the model returns numbers"
                )


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval. n: examples; seeds: how many; over: "examples" or "seeds", the wider one."""

    value: float
    low: float
    high: float
    n: int
    seeds: int = 1
    over: str = "examples"

    def above(self, limit: float) -> bool:
        return self.low > limit

    def below(self, limit: float) -> bool:
        return self.high < limit

    def within(self, low: float, high: float) -> bool:
        return self.low >= low and self.high <= high

    def describe(self) -> dict[str, object]:
        return {"value": self.value, "interval": [self.low, self.high], "examples": self.n, "seeds": self.seeds}


def unit_map(original: np.ndarray, retrained: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Scores -> [0, 1]. Probabilities stay; others (minus an error) are mapped by O's and R's range and cut to it.

    The cut keeps one wild prediction of a broken model from deciding a mean.
    """
    both = np.concatenate([original, retrained])
    low, high = float(both.min()), float(both.max())
    if low >= -1e-6 and high <= 1 + 1e-6:
        return lambda scores: np.asarray(scores, dtype=np.float64)
    span = high - low if high > low else 1.0
    return lambda scores: ((np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=low) - low) / span).clip(0.0, 1.0)


def unseen_share(n: int) -> float:
    """z^2 / (n + z^2): the share that what is seen in none of n examples may still have (Wilson's upper end)."""
    return Z95**2 / (n + Z95**2)


def gap(evidence: Evidence, resamples: int = RESAMPLES) -> Estimate:
    """m(O) - m(R), on mapped scores."""
    unit = unit_map(evidence.original, evidence.retrained)
    rows = np.stack([unit(evidence.original), unit(evidence.retrained)], axis=1)
    return _of_means(rows, lambda x: x[..., 0] - x[..., 1], resamples, 0.0)


def floor(evidence: Evidence) -> float:
    """|m(R') - m(R)|, on mapped scores."""
    unit = unit_map(evidence.original, evidence.retrained)
    return abs(float(unit(evidence.second).mean() - unit(evidence.retrained).mean()))


def residue(evidence: Evidence, model: str = "unlearned", resamples: int = RESAMPLES) -> Estimate:
    """r of `unlearned`, `second` or `original`."""
    return _residue(evidence, getattr(evidence, model), evidence.retrained, None, resamples)


def attacked_residue(evidence: Evidence, name: str, model: str = "unlearned", resamples: int = RESAMPLES) -> Estimate:
    """r_a for the attack of that name."""
    after = evidence.attacks[name]
    scores = getattr(after, model)
    if scores is None:
        raise BadData(f"expected scores of '{model}' after {name}, found none; attack that model too")
    return _residue(evidence, scores, after.retrained, after.rows, resamples)


def membership_residue(unlearned: Membership, retrained: Membership, resamples: int = RESAMPLES) -> Estimate:
    """g, by the same signal for both models on the same rows."""
    forget = np.stack([unlearned.forget, retrained.forget], axis=1)
    holdout = np.stack([unlearned.holdout, retrained.holdout], axis=1)
    return _of_pairs(forget, holdout, resamples, unseen_share(min(len(forget), len(holdout))))


def utility_loss(utility: Mapping[str, np.ndarray], resamples: int = RESAMPLES) -> Estimate | None:
    """d, or None where the retrained model is no better than an untrained one."""
    rows = np.stack(
        [np.asarray(utility[name], dtype=np.float64) for name in ("unlearned", "retrained", "untrained")], axis=1
    )

    def loss(x: np.ndarray) -> np.ndarray:
        return _ratio(x[..., 1] - x[..., 0], np.abs(x[..., 1] - x[..., 2]))

    worth = rows[:, 1].mean() - rows[:, 2].mean()
    return _of_means(rows, loss, resamples, 0.0) if worth > 0 else None


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of several seeds, with the wider of the mean interval over examples and t's over 3 seeds or more."""
    values = np.array([e.value for e in estimates])
    value, k = float(values.mean()), len(values)
    low, high = (float(np.mean([getattr(e, end) for e in estimates])) for end in ("low", "high"))
    over = "examples"
    if k >= 3:
        half = float(student.ppf(0.975, k - 1) * values.std(ddof=1) / math.sqrt(k))
        if 2 * half > high - low:
            low, high, over = value - half, value + half, "seeds"
    return Estimate(value, low, high, min(e.n for e in estimates), k, over)


def _residue(
    evidence: Evidence, scores: np.ndarray, zero: np.ndarray, places: np.ndarray | None, resamples: int
) -> Estimate:
    unit = unit_map(evidence.original, evidence.retrained)
    part = slice(None) if places is None else np.asarray(places)
    original, retrained = unit(evidence.original)[part], unit(evidence.retrained)[part]
    if not len(original) == len(scores) == len(zero):
        raise BadData(
            f"expected scores of the same {len(original)} rows, found {len(scores)} and {len(zero)}; "
            "give the attack's rows"
        )
    rows = np.stack([unit(scores), unit(zero), original, retrained], axis=1)

    def share(x: np.ndarray) -> np.ndarray:
        return _ratio(x[..., 0] - x[..., 1], x[..., 2] - x[..., 3])

    span = float(original.mean() - retrained.mean())
    largest = float(np.abs(original - retrained).max())
    least = unseen_share(len(rows)) * largest / span if span > 0 else math.inf
    return _of_means(rows, share, resamples, least)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is not positive."""
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), math.nan)


def _of_means(
    rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int, least: float
) -> Estimate:
    """An estimate of `statistic`, a function of column means (..., k) -> (...), by the bootstrap of rows (n, k)."""
    rows = rows[np.lexsort(rows.T[::-1])]  # so that the order of examples changes nothing
    value = float(statistic(rows.mean(0)))
    drawn = np.concatenate([counts @ rows for counts in _counts(len(rows), resamples, "forget")]) / len(rows)
    return _estimate(value, statistic(drawn), len(rows), least)


def _of_pairs(forget: np.ndarray, holdout: np.ndarray, resamples: int, least: float) -> Estimate:
    """AUC of column 0 minus AUC of column 1, rows of forget (n, 2) and holdout (h, 2) resampled apart."""
    forget, holdout = (part[np.lexsort(part.T[::-1])] for part in (forget, holdout))
    value, n = auc(forget[:, 0], holdout[:, 0]) - auc(forget[:, 1], holdout[:, 1]), min(len(forget), len(holdout))
    ones, others = (
        np.concatenate(list(_counts(len(part), resamples, name)))
        for part, name in ((forget, "forget"), (holdout, "holdout"))
    )
    drawn = np.zeros(len(ones))
    for start in range(0, len(forget), CHUNK):  # the matrix of all pairs would not fit in memory for large splits
        part, wins = forget[start : start + CHUNK], 0.0
        for column, sign in ((0, 1.0), (1, -1.0)):
            a, b = part[:, column, None], holdout[None, :, column]
            wins = wins + sign * ((a > b) + 0.5 * (a == b))
        drawn += ((ones[:, start : start + CHUNK] @ wins) * others).sum(1)
    return _estimate(value, drawn / (len(forget) * len(holdout)), n, least)


def _counts(n: int, resamples: int, *path: str) -> Iterator[np.ndarray]:
    """How often each of n rows is drawn, (some, n) for each of the resamples, in chunks that fit in memory."""
    rng = numpy_generator(0, "verdict", *path)
    for _ in range(0, resamples, CHUNK):
        yield rng.multinomial(n, np.full(n, 1 / n), size=CHUNK).astype(np.float64)


def _estimate(value: float, drawn: np.ndarray, n: int, least: float) -> Estimate:
    """The percentile interval, widened for few examples as `intervals.bootstrap` does, and by `least` at least."""
    drawn = drawn[np.isfinite(drawn)]
    if n < 2 or not math.isfinite(value) or not len(drawn):
        return Estimate(value, -math.inf, math.inf, n)
    low, high = np.percentile(drawn, [2.5, 97.5])
    below, above = (max(widening(n) * float(side), least) for side in (value - low, high - value))
    return Estimate(value, value - max(below, 0.0), value + max(above, 0.0), n)
