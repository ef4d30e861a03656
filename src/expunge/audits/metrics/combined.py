"""Several numbers in one: the average gap, ToW and NoMUS. Each hides something, so the signed gaps stand beside them.

    average gap = mean |m(U) - m(R)|  over  ua, ra, ta, MIA-efficacy          percentage points, 0 is best
    ToW         = prod over forget, retain, test of (1 - |acc(U) - acc(R)|)   1 is best (RUM, arXiv 2406.01257)
    ToW-MIA     = the same with MIA-efficacy in place of the forget accuracy
    NoMUS       = acc/2 + (1 - 2 |MIA - 1/2|)/2                               higher is better (arXiv 2311.02240)

NoMUS does not look at the retrained model: on MUCAC its authors' original scores above their retrained one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from expunge.audits.attacks.membership_checks import cross_validated_accuracy, svc_efficacy
from expunge.audits.base import Measured, Measurement, check
from expunge.audits.metrics.accuracy import share_right

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

EVERYTHING = ("retrained", "forget", "retain", "test")


def signed_gaps(unlearned: Mapping[str, float], retrained: Mapping[str, float]) -> dict[str, float]:
    """metric -> m(U) - m(R), in the metrics' unit."""
    return {name: unlearned[name] - retrained[name] for name in unlearned}


def mean_gap(unlearned: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """mean |m(U) - m(R)| over the metrics, in their unit; 0 is best."""
    return float(np.mean([abs(gap) for gap in signed_gaps(unlearned, retrained).values()]))


def tug_of_war(unlearned: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """prod (1 - |a_U - a_R|) over values in [0, 1]; 1 is best."""
    return float(np.prod([1 - abs(gap) for gap in signed_gaps(unlearned, retrained).values()]))


def nomus_score(accuracy: float, membership: float, weight: float = 0.5) -> float:
    """weight * accuracy + (1 - weight) * (1 - 2 |membership - 1/2|), both in [0, 1]; higher is better."""
    return weight * accuracy + (1 - weight) * (1 - 2 * abs(membership - 0.5))


def _percent(subjects: Subjects, subject: str) -> dict[str, float]:
    return {
        "ua": 100 - 100 * share_right(subjects, subject, "forget"),
        "ra": 100 * share_right(subjects, subject, "retain"),
        "ta": 100 * share_right(subjects, subject, "test"),
        "mia": 100 * svc_efficacy(subjects, subject),
    }


@check(
    "average_gap",
    unit="points",
    direction="lower",
    range=(0.0, 100.0),
    needs=EVERYTHING,
    kinds=("classification",),
    source="SalUn, arXiv 2310.12508, table 1",
)
def average_gap(subjects: Subjects) -> list[Measurement]:
    """Mean absolute gap to `retrained` over ua, ra, ta and MIA-efficacy, with the four signed gaps."""
    retrained = _percent(subjects, "retrained")
    whole = subjects.compute(lambda subject: mean_gap(_percent(subjects, subject), retrained))
    found = [average_gap.measurement(whole)]
    for name in retrained:
        gap = subjects.compute(lambda subject, name=name: signed_gaps(_percent(subjects, subject), retrained)[name])
        found.append(average_gap.measurement(gap, name=f"{name}_gap", direction="match", range=(-100.0, 100.0)))
    return found


@check(
    "tow",
    direction="higher",
    range=(0.0, 1.0),
    needs=EVERYTHING,
    kinds=("classification",),
    source="RUM, arXiv 2406.01257",
)
def tow(subjects: Subjects) -> list[Measurement]:
    """Tug of war: closeness of the three accuracies to the retrained model's, and the variant with MIA-efficacy."""

    def values(subject: str, forget: str) -> dict[str, float]:
        first = svc_efficacy(subjects, subject) if forget == "mia" else share_right(subjects, subject, "forget")
        return {forget: first} | {split: share_right(subjects, subject, split) for split in ("retain", "test")}

    return [
        tow.measurement(
            subjects.compute(lambda subject, kind=kind: tug_of_war(values(subject, kind), values("retrained", kind))),
            name=name,
        )
        for name, kind in (("tow", "forget"), ("tow_mia", "mia"))
    ]


@check(
    "nomus",
    direction="higher",
    range=(0.0, 1.0),
    needs=("retrained", "forget", "holdout", "test"),
    kinds=("classification",),
    source="MUFAC / MUCAC, arXiv 2311.02240",
)
def nomus(subjects: Subjects, weight: float = 0.5) -> list[Measurement]:
    """Utility and membership in one number, without looking at the retrained model."""
    value = subjects.compute(
        lambda subject: nomus_score(
            share_right(subjects, subject, "test"), cross_validated_accuracy(subjects, subject), weight
        )
    )
    distance = subjects.compute(lambda subject: abs(cross_validated_accuracy(subjects, subject) - 0.5))
    return [
        nomus.measurement(value, note="rewards utility, not closeness to retrained"),
        nomus.measurement(Measured(distance.values), name="forgetting_score", direction="lower", range=(0.0, 0.5)),
    ]
