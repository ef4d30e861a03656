"""Parts: what methods are made of. `from expunge.parts import *` gives the grammar in one line."""

from expunge.parts import adversaries, balances, objectives, schedules, scopes, stops
from expunge.parts.adversaries import average, curvature, gradient_penalty, pgd, sam, smooth
from expunge.parts.balances import aggregate, project
from expunge.parts.objectives import anchor, ascend, fit, l1, l2, leave, match, match_features, npo, relabel
from expunge.parts.plan import Auxiliary, Edit, Exact, Guard, Optimizer, Plan, Protection, Term, Training
from expunge.parts.schedules import Constant, Decay, Multiplier, Rise, Until
from expunge.parts.scopes import everything, fisher_ratio, largest, last_layers, layers, low_rank, random_weights, salient, unpruned
from expunge.parts.stops import divergence, forget_reaches_holdout, steps, utility_floor

__all__ = [
    "Auxiliary", "Constant", "Decay", "Edit", "Exact", "Guard", "Multiplier", "Optimizer", "Plan", "Protection", "Rise",
    "Term", "Training", "Until", "adversaries", "aggregate", "anchor", "ascend", "average", "balances", "curvature",
    "divergence", "everything", "fisher_ratio", "fit", "forget_reaches_holdout", "gradient_penalty", "l1", "l2", "largest",
    "last_layers", "layers", "leave", "low_rank", "match", "match_features", "npo", "objectives", "pgd", "project", "random_weights",
    "relabel", "salient", "sam", "schedules", "scopes", "smooth", "steps", "stops", "unpruned", "utility_floor",
]  # fmt: skip
