"""Pruning: set the smallest weights of the whole model to zero. Forgetting that sits in many small changes falls out.

Global magnitude: the `share` of all weights of at least two dimensions with the least |W|, whatever their layer.
Where equal magnitudes straddle the share, the earlier ones (in the model's order) go, so that the count is exact.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expunge.audits.attacks.budget import Attack, Budget, attack_check
from expunge.audits.attacks.quantisation import matrices
from expunge.errors import BadSetting

if TYPE_CHECKING:
    from expunge.cases.case import Case


def smallest(weights: Sequence[Tensor], share: float) -> list[Tensor]:
    """A bool mask for each weight, True at the round(share * total) entries of least magnitude over all of them."""
    if not weights:
        return []
    flat = torch.cat([weight.detach().abs().reshape(-1).float() for weight in weights])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.sort(stable=True).indices[: round(share * len(flat))]] = True
    parts = chosen.split([weight.numel() for weight in weights])
    return [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]


@dataclass(frozen=True)
class Pruning(Attack):
    """`share` of all weights set to zero."""

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise BadSetting(f"expected a share of weights in (0, 1), found {self.share}; e.g. 0.2")

    @property
    def name(self) -> str:
        return f"pruning_{100 * self.share:g}"

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        model = copy.deepcopy(model)
        weights = [parameter for parameter, _ in matrices(model)]
        with torch.no_grad():
            for weight, mask in zip(weights, smallest(weights, self.share), strict=True):
                weight.masked_fill_(mask, 0.0)
        return model


pruning_20 = attack_check(
    Pruning(0.2), "What pruning the smallest 20% of the weights brings back.", source="verdict card"
)
pruning_50 = attack_check(
    Pruning(0.5), "What pruning the smallest 50% of the weights brings back.", source="verdict card"
)
