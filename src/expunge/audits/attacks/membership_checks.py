"""The membership attacks of `membership.py` as checks over original, unlearned and retrained.

None of these numbers is good or bad alone. A model whose forget data stands out by being too bad leaks as well, so the
aim is the retrained model's value (direction "match"). Read `membership` (an AUC) beside the SVC: with well separated
scores the SVC flips between calling all members and none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from expunge.audits.attacks import membership as rules
from expunge.audits.base import Measured, Measurement, check

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

SHARE = {"direction": "match", "range": (0.0, 1.0), "attack": True}
SHADOW = ("retrained", "forget", "retain", "test")
CLASSES = ("classification",)


def svc_efficacy(subjects: Subjects, subject: str, signal: str = "confidence") -> float:
    """MIA-efficacy in [0, 1] of a subject, computed once."""
    return float(_called_out(subjects, subject, signal, 2000).mean())


def cross_validated_accuracy(subjects: Subjects, subject: str) -> float:
    """Accuracy of the loss attack, forget against holdout, computed once."""
    return subjects.memo(
        ("loss attack", subject),
        lambda: rules.cross_validated(
            subjects.losses(subject, "forget"), subjects.losses(subject, "holdout"), subjects.seed
        ),
    )


def _scores(subjects: Subjects, subject: str, signal: str, *splits: str) -> list[np.ndarray]:
    return [subjects.signal(subject, split, signal) for split in splits]


def _called_out(subjects: Subjects, subject: str, signal: str, cap: int) -> np.ndarray:
    return subjects.memo(
        ("svc", subject, signal, cap),
        lambda: rules.svc_nonmembers(
            *_scores(subjects, subject, signal, "retain", "test", "forget"), subjects.seed, cap
        ),
    )


@check("membership", needs=("retrained", "forget", "holdout"), source="AUC, forget against holdout", **SHARE)
def membership(subjects: Subjects, signal: str = "margin") -> list[Measurement]:
    """AUC of telling forget from holdout examples by one signal; the verdict's membership. ROC curves in `curves`."""

    def pair(subject: str) -> list[np.ndarray]:
        return _scores(subjects, subject, signal, "forget", "holdout")

    measured = subjects.measure(
        pair, rules.auc, lambda members, others: rules.auc_interval(members, others, subjects.seed, subjects.resamples)
    )
    curves = {}
    for subject in subjects.compared:
        fpr, tpr = rules.roc(*pair(subject))
        curves[subject] = {"fpr": fpr.tolist(), "tpr": tpr.tolist()}
    lists = {subject: pair(subject)[0].tolist() for subject in subjects.compared}
    measured = Measured(measured.values, measured.intervals, lists)
    found = [membership.measurement(measured, name="membership_auc", split="forget", unit="auc", curves=curves)]
    for limit, name in ((0.01, "membership_tpr_at_1pct_fpr"), (0.001, "membership_tpr_at_01pct_fpr")):
        holdout = len(subjects.case.split("holdout"))
        note = (
            ""
            if holdout * limit >= 1
            else f"{holdout} holdout examples cannot resolve this rate: no false positive allowed"
        )
        rate = subjects.compute(lambda subject, limit=limit: rules.tpr_at_fpr(*pair(subject), limit))
        found.append(membership.measurement(rate, name=name, split="forget", note=note))
    return found


@check("mia_efficacy", needs=SHADOW, kinds=CLASSES, source="SalUn's SVC-MIA, arXiv 2310.12508", **SHARE)
def mia_efficacy(subjects: Subjects, signal: str = "confidence", cap: int = 2000) -> list[Measurement]:
    """SVC-MIA: share of forget rows called non-members, and MIA-privacy (accuracy of retain against test)."""
    efficacy = subjects.proportion(lambda subject: _called_out(subjects, subject, signal, cap))
    privacy = subjects.compute(
        lambda subject: rules.svc_privacy(*_scores(subjects, subject, signal, "retain", "test"), subjects.seed, cap)
    )
    return [
        mia_efficacy.measurement(efficacy, split="forget"),
        mia_efficacy.measurement(privacy, name="mia_privacy", split="retain"),
    ]


@check("mia_threshold", needs=SHADOW, kinds=CLASSES, source="Song & Mittal, arXiv 2003.10595", **SHARE)
def mia_threshold(
    subjects: Subjects,
    signals: tuple[str, ...] = ("correctness", "confidence", "entropy", "modified_entropy"),
) -> list[Measurement]:
    """A threshold for each class and signal, fitted on retain against test: share of forget rows called members."""

    def called(subject: str, signal: str) -> np.ndarray:
        retain, test, forget = _scores(subjects, subject, signal, "retain", "test", "forget")
        cuts = rules.class_thresholds(retain, subjects.answers("retain"), test, subjects.answers("test"))
        return rules.called_members(forget, subjects.answers("forget"), cuts)

    return [
        mia_threshold.measurement(
            subjects.proportion(lambda subject, signal=signal: called(subject, signal)),
            name=f"mia_threshold_{signal}",
            split="forget",
        )
        for signal in signals
    ]


@check(
    "mia_entropy", needs=SHADOW, kinds=CLASSES, source="bad teaching, arXiv 2205.08096; SSD, arXiv 2308.07707", **SHARE
)
def mia_entropy(subjects: Subjects) -> list[Measurement]:
    """Balanced logistic regression on entropy: share of forget rows called members."""
    measured = subjects.proportion(
        lambda subject: rules.logistic_members(*_scores(subjects, subject, "entropy", "retain", "test", "forget"))
    )
    return [mia_entropy.measurement(measured, split="forget")]


@check("mia_loss", needs=("retrained", "forget", "holdout"), source="challenge kit; MUFAC, arXiv 2311.02240", **SHARE)
def mia_loss(subjects: Subjects) -> list[Measurement]:
    """Cross-validated logistic regression on the loss, forget against unseen: accuracy, 0.5 ideal."""
    measured = subjects.compute(lambda subject: cross_validated_accuracy(subjects, subject))
    return [mia_loss.measurement(measured, split="forget")]


@check("mia_boosted", needs=SHADOW, kinds=CLASSES, source="LAF's ASR (gradient boosting by scikit-learn)", **SHARE)
def mia_boosted(subjects: Subjects) -> list[Measurement]:
    """Gradient boosting on sorted probabilities: balanced accuracy of telling forget rows from test rows not fitted
    on."""
    measured = subjects.compute(
        lambda subject: rules.boosted_success(
            *(subjects.predictions(subject, split) for split in ("retain", "test", "forget")), subjects.seed
        )
    )
    return [mia_boosted.measurement(measured, split="forget")]


@check("mia_regression", needs=SHADOW, kinds=("regression",), source="arXiv 2210.08196, SVC on losses", **SHARE)
def mia_regression(subjects: Subjects, cap: int = 2000) -> list[Measurement]:
    """SVC on the loss, train against test: share of forget rows called members."""
    measured = subjects.proportion(
        lambda subject: rules.svc_members(
            *(subjects.losses(subject, split) for split in ("retain", "test", "forget")), subjects.seed, cap
        )
    )
    return [mia_regression.measurement(measured, split="forget", note="fitted on retain against test rows")]
