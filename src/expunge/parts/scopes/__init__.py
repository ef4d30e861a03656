"""Scopes: which weights may move, and how far."""

from expunge.parts.scopes.base import (
    Mask,
    Scope,
    everything,
    fisher_ratio,
    largest,
    last_layers,
    layers,
    random_weights,
    salient,
    sensitive,
    top_share,
    unpruned,
)
from expunge.parts.scopes.component import component
from expunge.parts.scopes.expanded import expanded
from expunge.parts.scopes.experts import experts
from expunge.parts.scopes.fila import fisher_low_rank
from expunge.parts.scopes.low_rank import low_rank
from expunge.parts.scopes.pruning import pruned
from expunge.parts.scopes.redrawn import redrawn
from expunge.parts.scopes.tracing import blocks, traced

__all__ = [
    "Mask", "Scope", "blocks", "component", "everything", "expanded", "experts", "fisher_low_rank", "fisher_ratio", "largest",
    "last_layers", "layers", "low_rank", "pruned", "random_weights", "redrawn", "salient", "sensitive", "top_share", "traced", "unpruned",
]  # fmt: skip
