"""Objectives: per-example losses that a term minimises. `objective.reads` says what references cost."""

from expunge.parts.objectives.base import Objective
from expunge.parts.objectives.boundary import last_output, nearest_class
from expunge.parts.objectives.likelihood import ascend, fit
from expunge.parts.objectives.match import attention, leave, match, match_features
from expunge.parts.objectives.noise import beside, class_noise, worst_inputs
from expunge.parts.objectives.penalties import anchor, l1, l2
from expunge.parts.objectives.preference import npo, npo_loss
from expunge.parts.objectives.relabel import relabel

__all__ = [
    "Objective", "anchor", "ascend", "attention", "beside", "class_noise", "fit", "l1", "l2", "last_output", "leave", "match",
    "match_features", "nearest_class", "npo", "npo_loss", "relabel", "worst_inputs",
]  # fmt: skip
