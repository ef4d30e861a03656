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
    top_share,
    unpruned,
)
from expunge.parts.scopes.low_rank import low_rank

__all__ = [
    "Mask", "Scope", "everything", "fisher_ratio", "largest", "last_layers", "layers", "low_rank", "random_weights", "salient",
    "top_share", "unpruned",
]  # fmt: skip
