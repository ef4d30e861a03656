"""Objectives: per-example losses that a term minimises. `objective.reads` says what references cost."""

from expunge.parts.objectives.base import Objective
from expunge.parts.objectives.likelihood import ascend, fit
from expunge.parts.objectives.match import attention, leave, match, match_features
from expunge.parts.objectives.penalties import anchor, l1, l2
from expunge.parts.objectives.preference import npo, npo_loss
from expunge.parts.objectives.relabel import relabel

__all__ = [
    "Objective", "anchor", "ascend", "attention", "fit", "l1", "l2", "leave", "match", "match_features", "npo", "npo_loss",
    "relabel",
]  # fmt: skip
