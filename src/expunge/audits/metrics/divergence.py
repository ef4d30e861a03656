"""How far two models' predicted distributions lie apart on the forget data.

    JS(p, q)             = KL(p || m)/2 + KL(q || m)/2,  m = (p + q)/2,  natural log, so 0 <= JS <= log 2
    activation distance  = mean || p_U(x) - p_R(x) ||_2
    ZRF                  = 1 - mean JS(p_U(x), p_untrained(x))      (bad teaching, arXiv 2205.08096)

Official bug (bad teaching's `metrics.py`, copied by SSD): it computes KL(m || p)/2 + KL(m || q)/2 and averages over
batch AND classes, which is not JS and K times too small, so that every model scores above 0.9. The test on disjoint
distributions (JS = log 2 exactly) catches both halves of it. ZRF has no good value of its own: the aim is the retrained
model's, and 1 is not the goal when random samples are forgotten.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import rel_entr

from expunge.audits.base import Measurement, check

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

LOG2 = math.log(2)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(n,) Jensen-Shannon divergence in nats of rows of probabilities p, q (n, K); between 0 and log 2."""
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    middle = (p + q) / 2
    return np.clip((rel_entr(p, middle).sum(-1) + rel_entr(q, middle).sum(-1)) / 2, 0.0, LOG2)


def activation_distance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(n,) Euclidean distance of rows of probabilities p, q (n, K); between 0 and sqrt 2."""
    return np.linalg.norm(np.asarray(p, dtype=np.float64) - np.asarray(q, dtype=np.float64), axis=-1)


def zero_retrain_forgetting(p: np.ndarray, untrained: np.ndarray) -> float:
    """ZRF of probabilities p (n, K) against those of an untrained model; between 1 - log 2 and 1."""
    return float(1 - jensen_shannon(p, untrained).mean())


def _distances(subjects: Subjects, item, distance) -> list[Measurement]:
    """The mean distance to `retrained` on the forget split, and on the test split where there is one."""
    found = []
    for split in ("forget", "test"):
        if subjects.unmet(split) is None:
            measured = subjects.measure(
                lambda subject, split=split: distance(
                    subjects.predictions(subject, split), subjects.predictions("retrained", split)
                )
            )
            found.append(item.measurement(measured, name=f"{item.name}_{split}", split=split))
    return found


@check(
    "js_divergence",
    unit="nats",
    direction="lower",
    range=(0.0, LOG2),
    needs=("retrained", "forget"),
    kinds=("classification",),
    source="Lin 1991; bad teaching, arXiv 2205.08096",
)
def js_divergence(subjects: Subjects) -> list[Measurement]:
    """Mean Jensen-Shannon divergence of the predictions from the retrained model's."""
    return _distances(subjects, js_divergence, jensen_shannon)


@check(
    "activation_distance",
    direction="lower",
    range=(0.0, math.sqrt(2)),
    needs=("retrained", "forget"),
    kinds=("classification",),
    source="Golatkar et al., arXiv 1911.04933",
)
def activation(subjects: Subjects) -> list[Measurement]:
    """Mean Euclidean distance of the predicted probabilities from the retrained model's."""
    return _distances(subjects, activation, activation_distance)


@check(
    "zrf",
    direction="match",
    range=(1 - LOG2, 1.0),
    needs=("retrained", "forget", "untrained"),
    kinds=("classification",),
    source="bad teaching, arXiv 2205.08096, eq. 4, with the true JS",
)
def zrf(subjects: Subjects) -> list[Measurement]:
    """Zero retrain forgetting: closeness to an untrained model on the forget data; the aim is the retrained model's
    value."""
    untrained = subjects.predictions("untrained", "forget")
    measured = subjects.measure(lambda subject: 1 - jensen_shannon(subjects.predictions(subject, "forget"), untrained))
    return [zrf.measurement(measured, split="forget")]
