"""Forgetting quality of the NeurIPS 2023 unlearning challenge (Triantafillou et al., arXiv 2406.09073).

For each forget example, N unlearned models (of ONE original: the question is about unlearning's randomness) and N
retrained ones give two samples of margins. An attacker tries every rule of two families, and each rule with error rates
FPR and FNR bounds the differential-privacy epsilon of unlearning from below:

    eps   = max over rules of max{ log(1 - delta - FPR) - log FNR,  log(1 - delta - FNR) - log FPR },  clipped to [0,
    50]
    H     = 2^(-floor(eps / 0.5)) if eps < ceil(log(N - 1)) else 0          F = mean H
    final = F * (RA_U / RA_R) * (TA_U / TA_R)

Rules: one cut (100 per unit of margin; above it is the sample of larger median), and two cuts (between them is the
peakier sample; both within 2 units of its ends). A rule with FPR = FNR = 0 separates: eps is infinite. A rule with one
of them 0 is discarded. If the narrower range is below 1% of the wider, eps is 50.

The maximum over many cuts overfits small N: two independent sets of retrained models score F = .11 at N = 64. So F is
always given with this ceiling. Departures: the released scorer asserts the truth of an array and stops; where no rule
survives it would too, and here eps is 50 (no evidence of overlap); two equal constants are eps 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from expunge.audits.base import Measured, Measurement, check
from expunge.audits.metrics.accuracy import share_right
from expunge.audits.metrics.intervals import bootstrap, mean
from expunge.audits.metrics.klom import paired_halves

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

CAP = 50.0
BUFFER = 2.0


def rates_to_epsilon(fpr: np.ndarray, fnr: np.ndarray, delta: float = 1e-5) -> float:
    """The largest epsilon that any rule proves, from error rates (rules,); `CAP` where rules separate or none
    survives."""
    if np.any((fpr == 0) & (fnr == 0)):
        return CAP
    kept = (fpr > 0) & (fnr > 0)
    if not kept.any():
        return CAP
    fpr, fnr = fpr[kept], fnr[kept]
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = np.stack([np.log(1 - delta - fpr) - np.log(fnr), np.log(1 - delta - fnr) - np.log(fpr)])
    best = np.nanmax(np.where(np.isnan(bounds), -np.inf, bounds))
    return float(np.clip(best, 0.0, CAP))


def example_epsilon(unlearned: np.ndarray, retrained: np.ndarray, delta: float = 1e-5, per_unit: int = 100) -> float:
    """epsilon of one example from margins (N,) of unlearned and of retrained models."""
    u, r = np.sort(unlearned.astype(np.float64)), np.sort(retrained.astype(np.float64))
    widths = sorted([float(np.ptp(u)), float(np.ptp(r))])
    if widths[1] == 0:
        return 0.0 if u[0] == r[0] else CAP
    if widths[0] / widths[1] < 0.01:
        return CAP
    rules = [_one_cut(u, r, per_unit), _two_cuts(u, r, per_unit)]
    return rates_to_epsilon(
        np.concatenate([rule[0] for rule in rules]), np.concatenate([rule[1] for rule in rules]), delta
    )


def _one_cut(u: np.ndarray, r: np.ndarray, per_unit: int) -> tuple[np.ndarray, np.ndarray]:
    positive, negative = (r, u) if np.median(r) > np.median(u) else (u, r)
    low, high = min(u[0], r[0]), max(u[-1], r[-1])
    cuts = np.linspace(low, high, max(math.ceil((high - low) * per_unit), 2))
    return 1 - np.searchsorted(negative, cuts, "left") / len(negative), np.searchsorted(positive, cuts, "left") / len(
        positive
    )


def _two_cuts(u: np.ndarray, r: np.ndarray, per_unit: int) -> tuple[np.ndarray, np.ndarray]:
    peaky, wide = (r, u) if np.ptp(u) >= np.ptp(r) else (u, r)
    width, count = float(np.ptp(peaky)), math.ceil(2 * BUFFER * per_unit)
    right = np.linspace(peaky[-1] - BUFFER, peaky[-1] + BUFFER, count)
    left = (right - width)[:, None] + np.linspace(-BUFFER, BUFFER, count)[None, :]

    def inside(sample: np.ndarray) -> np.ndarray:
        upper = np.searchsorted(sample, right, "right")[:, None]
        return np.maximum(upper - np.searchsorted(sample, left.ravel(), "left").reshape(left.shape), 0).ravel() / len(
            sample
        )

    return inside(wide), 1 - inside(peaky)


def halving(epsilon: np.ndarray, models: int, bucket: float = 0.5) -> np.ndarray:
    """H in [0, 1]: halves with every `bucket` of epsilon, and 0 beyond what `models` samples can tell."""
    limit = bucket * math.floor(math.ceil(math.log(max(models - 1, 1))) / bucket)
    epsilon = np.asarray(epsilon, dtype=np.float64)
    return np.where(epsilon < limit, 0.5 ** np.floor(epsilon / bucket), 0.0)


def forgetting_quality(
    unlearned: np.ndarray, retrained: np.ndarray, delta: float = 1e-5, per_unit: int = 100
) -> tuple[float, np.ndarray, np.ndarray]:
    """F, H (n,) and epsilon (n,) from margins unlearned (N, n) and retrained (N, n). F is higher the better."""
    epsilon = np.array(
        [example_epsilon(unlearned[:, x], retrained[:, x], delta, per_unit) for x in range(unlearned.shape[1])]
    )
    h = halving(epsilon, len(unlearned))
    return float(h.mean()), h, epsilon


def final_score(quality: float, ra: float, ra_retrained: float, ta: float, ta_retrained: float) -> float:
    """F * (RA_U / RA_R) * (TA_U / TA_R); accuracies are means over runs."""
    return quality * (ra / ra_retrained) * (ta / ta_retrained)


@check(
    "forgetting_quality",
    direction="higher",
    range=(0.0, 1.0),
    needs=("retrained", "unlearned_ensemble", "retrained_ensemble", "forget", "retain", "test"),
    kinds=("classification",),
    source="NeurIPS 2023 challenge, arXiv 2406.09073",
)
def quality(subjects: Subjects, delta: float = 1e-5, per_unit: int = 100) -> list[Measurement]:
    """The challenge's F with its attainable ceiling F(R', R), F over the ceiling, the mean epsilon and the final score.

    The final score takes the accuracies of the audited single models.
    """
    sets, oracle, note = paired_halves(subjects, "forget")
    found = {name: forgetting_quality(part, oracle, delta, per_unit) for name, part in sets.items()}
    ceiling = found["floor"][0]
    note = f"attainable ceiling F(R', R) = {ceiling:.3g}; {note}"
    intervals = {name: bootstrap((part[1],), mean, subjects.seed, subjects.resamples) for name, part in found.items()}
    intervals.pop("floor")
    values = {name: part[0] for name, part in found.items() if name != "floor"} | {
        "retrained": 1.0,
        "floor": 1 - ceiling,
    }
    lists = {name: part[2].tolist() for name, part in found.items()}
    out = [quality.measurement(Measured(values, intervals, lists), split="forget", note=note)]
    if ceiling > 0:
        over = {name: part[0] / ceiling for name, part in found.items() if name != "floor"} | {"retrained": 1.0}
        out.append(
            quality.measurement(
                Measured(over), name="forgetting_over_ceiling", split="forget", range=(0.0, None), note=note
            )
        )
    epsilons = {name: float(part[2].mean()) for name, part in found.items()} | {"retrained": 0.0}
    out.append(
        quality.measurement(
            Measured(epsilons),
            name="forgetting_epsilon",
            split="forget",
            range=(0.0, CAP),
            direction="lower",
            note=note,
        )
    )
    ra, ta = (share_right(subjects, "retrained", split) for split in ("retain", "test"))
    if ra > 0 and ta > 0:
        finals = {
            name: final_score(
                part[0], share_right(subjects, name, "retain"), ra, share_right(subjects, name, "test"), ta
            )
            for name, part in found.items()
            if name != "floor"
        } | {"retrained": 1.0, "floor": 1 - ceiling}
        out.append(quality.measurement(Measured(finals), name="challenge_score", range=(0.0, None), note=note))
    return out
