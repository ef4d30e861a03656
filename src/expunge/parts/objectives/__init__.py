"""Objectives: per-example losses that a term minimises. `objective.reads` says what references cost."""

from expunge.parts.objectives.base import Objective
from expunge.parts.objectives.boundary import last_output, nearest_class
from expunge.parts.objectives.choices import (
    at_choices,
    ceu,
    flatten_logits,
    from_uniform,
    inverted_hinge,
    satimp,
    undial,
    unlikelihood,
    weighted_ascent,
)
from expunge.parts.objectives.drawn import drawn
from expunge.parts.objectives.likelihood import ascend, fit
from expunge.parts.objectives.match import attention, leave, match, match_features
from expunge.parts.objectives.noise import beside, class_noise, worst_inputs
from expunge.parts.objectives.pairs import flat
from expunge.parts.objectives.penalties import anchor, l1, l2
from expunge.parts.objectives.preference import dpo, kto, npo, npo_loss, simnpo
from expunge.parts.objectives.redirect import guided_error, negated, redirect, unconditioned
from expunge.parts.objectives.relabel import relabel
from expunge.parts.objectives.steering import hold, steer
from expunge.parts.objectives.wrapped import clean, instead, one_of

__all__ = [
    "Objective", "anchor", "ascend", "at_choices", "attention", "beside", "ceu", "class_noise", "clean", "dpo",
    "drawn", "fit", "flat", "flatten_logits", "from_uniform", "guided_error", "hold", "instead", "inverted_hinge",
    "kto", "l1", "l2", "last_output", "leave", "match", "match_features", "nearest_class", "negated", "npo",
    "npo_loss", "one_of", "redirect", "relabel", "satimp", "simnpo", "steer", "unconditioned", "undial", "unlikelihood",
    "weighted_ascent", "worst_inputs",
]  # fmt: skip
