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

__all__ = [
    "Mask", "Scope", "everything", "fisher_ratio", "largest", "last_layers", "layers", "random_weights", "salient",
    "top_share", "unpruned",
]  # fmt: skip
