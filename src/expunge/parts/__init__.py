"""Parts: what methods are made of. `from expunge.parts import *` gives the grammar in one line."""

from expunge.parts import adversaries, balances, objectives, schedules, scopes, stops
from expunge.parts.adversaries import average, curvature, gradient_penalty, pgd, sam, smooth
from expunge.parts.balances import aggregate, project
from expunge.parts.latents import latent
from expunge.parts.objectives import (
    anchor,
    ascend,
    at_choices,
    beside,
    ceu,
    class_noise,
    clean,
    dpo,
    drawn,
    fit,
    flat,
    flatten_logits,
    from_uniform,
    hold,
    instead,
    inverted_hinge,
    kto,
    l1,
    l2,
    last_output,
    leave,
    match,
    match_features,
    nearest_class,
    negated,
    npo,
    redirect,
    relabel,
    satimp,
    simnpo,
    steer,
    undial,
    unlikelihood,
    weighted_ascent,
    worst_inputs,
)
from expunge.parts.plan import Auxiliary, Edit, Exact, Guard, Optimizer, Plan, Protection, Term, Training
from expunge.parts.players import player
from expunge.parts.proximal import soft_threshold
from expunge.parts.rewind import lowest_joint, rewind
from expunge.parts.schedules import Constant, Decay, Drift, Multiplier, Rise, Until
from expunge.parts.scopes import (
    blocks,
    component,
    everything,
    expanded,
    experts,
    fisher_low_rank,
    fisher_ratio,
    largest,
    last_layers,
    layers,
    low_rank,
    pruned,
    random_weights,
    redrawn,
    salient,
    traced,
    unpruned,
)
from expunge.parts.stops import divergence, forget_reaches_holdout, reaches, steps, utility_floor

__all__ = [
    "Auxiliary", "Constant", "Decay", "Drift", "Edit", "Exact", "Guard", "Multiplier", "Optimizer", "Plan",
    "Protection", "Rise", "Term", "Training", "Until", "adversaries", "aggregate", "anchor", "ascend", "at_choices",
    "average", "balances", "beside", "blocks", "ceu", "class_noise", "clean", "component", "curvature", "divergence",
    "dpo", "drawn", "everything", "expanded", "experts", "fisher_low_rank", "fisher_ratio", "fit", "flat",
    "flatten_logits", "forget_reaches_holdout", "from_uniform", "gradient_penalty", "hold", "instead",
    "inverted_hinge", "kto", "l1", "l2", "largest", "last_layers", "last_output", "latent", "layers", "leave",
    "low_rank", "lowest_joint", "match", "match_features", "nearest_class", "negated", "npo", "objectives", "pgd",
    "player", "project", "pruned", "random_weights", "reaches", "redirect", "redrawn", "relabel", "rewind", "salient",
    "sam", "satimp", "schedules", "scopes", "simnpo", "smooth", "soft_threshold", "steer", "steps", "stops", "traced",
    "undial", "unlikelihood", "unpruned", "utility_floor", "weighted_ascent", "worst_inputs",
]  # fmt: skip
