"""KLoM: does the law of the margins, over training randomness, equal that of retrained models, point by point?

Attribute-to-Delete: Machine Unlearning via Datamodel Matching (arXiv 2410.23232). For each example, the margins of N
unlearned models and of N retrained ones ("oracles") are clipped to [-100, 100] and put in 20 shared bins:

    KLoM(x) = sum_b p_U(b) log( p_U(b) / max(p_R(b), 1e-5) )       nats; direction KL(unlearned || oracle)

The N unlearned models must come from N different originals. Few models inflate it, hence the floor: oracles against
other oracles, never 0. Departures from released code: the bin's right edge is included (both releases drop the largest
margin), and the direction is the paper's (the 2025 release passes its arguments the other way round).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from expunge.audits.base import Measured, Measurement, check
from expunge.audits.metrics.intervals import bootstrap

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects


def margin_divergence(
    unlearned: np.ndarray, oracle: np.ndarray, bins: int = 20, clip: float = 100.0, floor: float = 1e-5
) -> np.ndarray:
    """(n,) KLoM of margins unlearned (N, n) against oracle (N', n), in nats."""
    unlearned, oracle = (np.clip(np.asarray(part, dtype=np.float64), -clip, clip) for part in (unlearned, oracle))
    found = np.zeros(unlearned.shape[1])
    for x in range(unlearned.shape[1]):
        u, o = unlearned[:, x], oracle[:, x]
        low, high = min(u.min(), o.min()), max(u.max(), o.max())
        if high > low:
            p = np.histogram(u, bins, (low, high))[0] / len(u)
            q = np.maximum(np.histogram(o, bins, (low, high))[0] / len(o), floor)
            seen = p > 0
            found[x] = max(float(np.sum(p[seen] * np.log(p[seen] / q[seen]))), 0.0)
    return found


def paired_halves(subjects: Subjects, split: str) -> tuple[dict[str, np.ndarray], np.ndarray, str]:
    """Margins (N, n) of original, unlearned and floor, and of the oracles they are compared with, all with equal N.

    Without a second ensemble of oracles, the one there is gives its first half as floor and its second as reference.
    """
    oracle = subjects.matrix("retrained", split)
    if "floor" in subjects.ensembles:
        second, note = subjects.matrix("floor", split), ""
    else:
        half = len(oracle) // 2
        second, oracle, note = oracle[:half], oracle[half : 2 * half], "floor from halves of one ensemble; "
    names = [name for name in ("original", "unlearned") if name in subjects.ensembles]
    sets = {name: subjects.matrix(name, split) for name in names} | {"floor": second}
    n = min(len(oracle), *(len(part) for part in sets.values()))
    return {name: part[:n] for name, part in sets.items()}, oracle[:n], f"{note}N={n} models each"


@check(
    "klom",
    unit="nats",
    direction="lower",
    range=(0.0, None),
    needs=("unlearned_ensemble", "retrained_ensemble", "forget"),
    source="arXiv 2410.23232, KL(unlearned || oracle)",
)
def klom(subjects: Subjects, bins: int = 20) -> list[Measurement]:
    """KL of margins between many unlearned and many retrained models: mean and 95th percentile over a split's
    points."""
    found = []
    for split in ("forget", "retain", "test"):
        if subjects.unmet(split) is not None or not _has(subjects, split):
            continue
        sets, oracle, note = paired_halves(subjects, split)
        points = {name: margin_divergence(part, oracle, bins) for name, part in sets.items()}
        for kind, statistic in (("mean", lambda values: float(np.mean(values))), ("p95", _p95)):
            values = {name: statistic(part) for name, part in points.items()} | {"retrained": 0.0}
            intervals = {
                name: bootstrap((part,), statistic, subjects.seed, subjects.resamples)
                for name, part in points.items()
                if name != "floor"
            }
            lists = {name: part.tolist() for name, part in points.items()} if kind == "mean" else None
            measured = Measured(values, intervals, lists)
            found.append(klom.measurement(measured, name=f"klom_{kind}_{split}", split=split, note=note))
    return found


def _p95(values: np.ndarray) -> float:
    return float(np.percentile(values, 95))


def _has(subjects: Subjects, split: str) -> bool:
    """Ensembles given as mappings may hold the forget split only."""
    from collections.abc import Mapping

    sources = [subjects.ensembles[name] for name in ("unlearned", "retrained")]
    return all(not isinstance(s, Mapping) or split in s or (split, "margin") in s for s in sources)
