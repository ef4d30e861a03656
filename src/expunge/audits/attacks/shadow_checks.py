"""U-LiRA and RMIA as checks, over the ensembles handed to `Subjects`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from expunge.audits.attacks.membership import auc, auc_interval, roc
from expunge.audits.attacks.shadow import rmia, u_lira_accuracy, u_lira_pairs
from expunge.audits.base import Measured, Measurement, check
from expunge.audits.metrics.intervals import bootstrap
from expunge.audits.metrics.klom import paired_halves

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects


@check(
    "u_lira",
    direction="match",
    range=(0.0, 1.0),
    attack=True,
    needs=("unlearned_ensemble", "retrained_ensemble", "forget"),
    source="arXiv 2403.01218; leave-one-out pairs",
)
def u_lira(subjects: Subjects, shared: bool = False) -> list[Measurement]:
    """U-LiRA on one forget set, N pairs of unlearned and retrained models: accuracy and AUC; 0.5 is ideal."""
    sets, oracle, note = paired_halves(subjects, "forget")
    ratios = {name: u_lira_pairs(part, oracle, shared) for name, part in sets.items()}

    def rows(name: str) -> np.ndarray:
        # An example carries all its models with it, so intervals are over examples.
        inside, outside = ratios[name]
        return np.stack([inside.T, outside.T], axis=1)

    def accuracy(rows: np.ndarray) -> float:
        return u_lira_accuracy(rows[:, 0], rows[:, 1])

    def area(rows: np.ndarray) -> float:
        return auc(rows[:, 0].ravel(), rows[:, 1].ravel())

    found = []
    for name, statistic in (("u_lira_accuracy", accuracy), ("u_lira_auc", area)):
        values = {subject: statistic(rows(subject)) for subject in ratios} | {"retrained": 0.5}
        values["floor"] = abs(values["floor"] - 0.5)
        intervals = {
            subject: bootstrap((rows(subject),), statistic, subjects.seed, 100)
            for subject in ratios
            if subject != "floor"
        }
        found.append(u_lira.measurement(Measured(values, intervals), name=name, split="forget", note=note))
    return found


@check(
    "rmia",
    unit="auc",
    direction="match",
    range=(0.0, 1.0),
    attack=True,
    needs=("retrained", "retrained_ensemble", "forget", "holdout", "test"),
    kinds=("classification",),
    source="arXiv 2312.03262",
)
def rmia_check(subjects: Subjects, a: float = 0.3, gamma: float = 1.0) -> list[Measurement]:
    """Offline RMIA, forget against holdout, with retrained models as references and test as population: AUC."""
    references = {split: subjects.matrix("retrained", split, "confidence") for split in ("forget", "holdout", "test")}

    def scores(subject: str) -> list[np.ndarray]:
        own = {split: subjects.signal(subject, split, "confidence") for split in references}
        return [
            rmia(own[split], references[split], own["test"], references["test"], a=a, gamma=gamma)
            for split in ("forget", "holdout")
        ]

    measured = subjects.measure(
        scores, auc, lambda members, others: auc_interval(members, others, subjects.seed, subjects.resamples)
    )
    curves = {}
    for subject in subjects.compared:
        fpr, tpr = roc(*scores(subject))
        curves[subject] = {"fpr": fpr.tolist(), "tpr": tpr.tolist()}
    return [rmia_check.measurement(measured, name="rmia_auc", split="forget", curves=curves)]
