"""Accuracies on the splits, and what the task's own utility and forget score say.

    ua = 100 - acc(forget)      ra = acc(retain)      ta = acc(test)      all in percent

The case gives `ta` the test points of kept classes only, so for a class request the forgotten class is told apart as
`forgotten_class_accuracy`. None has a good value of its own: the aim is the retrained model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from expunge.audits.base import Measurement, check

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.data import Split

CARD = "Machine unlearning's accuracy family (SalUn, arXiv 2310.12508, sec. 5.1)"
PERCENT = {"unit": "%", "range": (0.0, 100.0), "kinds": ("classification",), "source": CARD}


def accuracy(predicted: np.ndarray, answers: np.ndarray) -> float:
    """Share in [0, 1] of (n,) predicted classes that equal the (n,) answers."""
    return float(np.mean(np.asarray(predicted) == np.asarray(answers)))


def right(subjects: Subjects, subject: str, split: str | Split) -> np.ndarray:
    """(n,) 1.0 where the subject's most likely class is the answer."""
    return subjects.signal(subject, split, "correctness")


def share_right(subjects: Subjects, subject: str, split: str | Split) -> float:
    """Accuracy in [0, 1] of a subject on a split."""
    return float(right(subjects, subject, split).mean())


@check("ua", direction="match", needs=("retrained", "forget"), **PERCENT)
def ua(subjects: Subjects) -> list[Measurement]:
    """Unlearning accuracy: 100 - accuracy on the forget data."""
    found = subjects.proportion(lambda subject: right(subjects, subject, "forget"), 100.0, flip=True)
    return [ua.measurement(found, split="forget")]


@check("ra", direction="match", needs=("retrained", "retain"), **PERCENT)
def ra(subjects: Subjects) -> list[Measurement]:
    """Accuracy on the data to keep."""
    found = subjects.proportion(lambda subject: right(subjects, subject, "retain"), 100.0)
    return [ra.measurement(found, split="retain")]


@check("ta", direction="higher", needs=("retrained", "test"), **PERCENT)
def ta(subjects: Subjects) -> list[Measurement]:
    """Accuracy on data never seen (of the kept classes, for a class request)."""
    found = subjects.proportion(lambda subject: right(subjects, subject, "test"), 100.0)
    return [ta.measurement(found, split="test")]


@check("forgotten_class_accuracy", direction="match", needs=("retrained", "kind_holdout"), **PERCENT)
def forgotten_class_accuracy(subjects: Subjects) -> list[Measurement]:
    """Accuracy on unseen data of the forgotten kind."""
    found = subjects.proportion(lambda subject: right(subjects, subject, "holdout"), 100.0)
    return [forgotten_class_accuracy.measurement(found, split="holdout")]


@check("utility", direction="higher", needs=("retrained", "retain"), source="Task.utility")
def utility(subjects: Subjects) -> list[Measurement]:
    """The task's own utility on every split there is (accuracy in [0, 1], minus the mean loss, ...)."""
    name = subjects.task.utility
    splits = [split for split in ("retain", "forget", "holdout", "test") if subjects.unmet(split) is None]
    return [
        utility.measurement(
            subjects.compute(lambda subject, split=split: subjects.evaluate(subject, split)[name]),
            name=f"utility_{split}",
            split=split,
            unit=name,
            direction="higher" if split in ("retain", "test") else "match",
        )
        for split in splits
    ]


@check("forget_score", direction="match", needs=("retrained", "forget"), source="Task.forget_score, the verdict's m(.)")
def forget_score(subjects: Subjects) -> list[Measurement]:
    """Mean forget score: how well the model knows the forget data (probability of the true class, minus the error,
    ...)."""
    found = []
    for split in ("forget", "holdout"):
        if subjects.unmet(split) is None:
            measured = subjects.measure(lambda subject, split=split: subjects.forget_scores(subject, split))
            found.append(forget_score.measurement(measured, name=f"forget_score_{split}", split=split))
    return found


@check(
    "corrective",
    direction="higher",
    needs=("retrained", "holdout", "test"),
    **(PERCENT | {"source": "arXiv 2402.14015"}),
)
def corrective(
    subjects: Subjects, affected: str | Split = "holdout", clean: str | Split = "test", labels: str = "clean_labels"
) -> list[Measurement]:
    """Acc_corr: accuracy by true labels on the affected test domain; Acc_retain: on the rest of the test data.

    affected, clean: splits whose labels are the true ones (patched test images; test images of the confused classes).
    labels: the column with the forget rows' clean labels; where the data has it, `delete_accuracy` is accuracy by clean
    labels on the forget rows. `delete_error` is the share of forget rows on which the wrong label is no longer said.
    """
    found = [
        corrective.measurement(
            subjects.proportion(lambda subject, split=split: right(subjects, subject, split), 100.0),
            name=name,
            split=getattr(split, "name", split),
        )
        for name, split in (("accuracy_corrected", affected), ("accuracy_retained", clean))
    ]
    wrong = subjects.proportion(lambda subject: right(subjects, subject, "forget"), 100.0, flip=True)
    found.append(corrective.measurement(wrong, name="delete_error", split="forget"))
    if labels in subjects.case.data.names:
        truth = np.asarray(subjects.case.data.column(labels))[subjects.passed("original", "forget").ids]
        cleaned = subjects.proportion(
            lambda subject: subjects.predictions(subject, "forget").argmax(-1) == truth, 100.0
        )
        found.append(corrective.measurement(cleaned, name="delete_accuracy", split="forget"))
    return found
