"""Parts: what methods are made of. `from expunge.parts import *` gives the grammar in one line."""

from expunge.parts import adversaries, balances, objectives, schedules, scopes, stops
from expunge.parts.adversaries import average, curvature, gradient_penalty, pgd, sam, smooth
from expunge.parts.balances import aggregate, project
from expunge.parts.objectives import (
    anchor,
    ascend,
    beside,
    class_noise,
    fit,
    l1,
    l2,
    last_output,
    leave,
    match,
    match_features,
    nearest_class,
    npo,
    relabel,
    worst_inputs,
)
from expunge.parts.plan import Auxiliary, Edit, Exact, Guard, Optimizer, Plan, Protection, Term, Training
from expunge.parts.proximal import soft_threshold
from expunge.parts.rewind import rewind
from expunge.parts.schedules import Constant, Decay, Multiplier, Rise, Until
from expunge.parts.scopes import (
    everything,
    expanded,
    fisher_ratio,
    largest,
    last_layers,
    layers,
    low_rank,
    pruned,
    random_weights,
    redrawn,
    salient,
    unpruned,
)
from expunge.parts.stops import divergence, forget_reaches_holdout, steps, utility_floor

__all__ = [
    "Auxiliary", "Constant", "Decay", "Edit", "Exact", "Guard", "Multiplier", "Optimizer", "Plan", "Protection",
    "Rise", "Term", "Training", "Until", "adversaries", "aggregate", "anchor", "ascend", "average", "balances",
    "beside", "class_noise", "curvature", "divergence", "everything", "expanded", "fisher_ratio", "fit",
    "forget_reaches_holdout", "gradient_penalty", "l1", "l2", "largest", "last_layers", "last_output", "layers",
    "leave", "low_rank", "match", "match_features", "nearest_class", "npo", "objectives", "pgd", "project", "pruned",
    "random_weights", "redrawn", "relabel", "rewind", "salient", "sam", "schedules", "scopes", "smooth",
    "soft_threshold", "steps", "stops", "unpruned", "utility_floor", "worst_inputs",
]  # fmt: skip
