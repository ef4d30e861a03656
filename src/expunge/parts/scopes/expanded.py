"""One more output while training, gone afterwards: a place for what must be forgotten (Chen et al., CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from expunge.errors import BadModel
from expunge.parts.scopes.base import Mask, Scope


@dataclass(frozen=True)
class Expanded(Scope):
    """The last linear layer has K+1 outputs during training and its own K again afterwards. All weights may move.

    One port of the method never deletes the extra output, so that its models are measured over K+1 classes; `leave`
    does.
    """

    def enter(self, model: nn.Module, workbench: Any) -> nn.Module:
        head = self._head(model)
        extra = nn.Linear(head.in_features, 1, bias=head.bias is not None).to(head.weight)
        self._resize(
            head,
            torch.cat([head.weight, extra.weight]),
            None if head.bias is None else torch.cat([head.bias, extra.bias]),
        )
        return model

    def leave(self, model: nn.Module) -> nn.Module:
        head = self._head(model)
        self._resize(head, head.weight[:-1].clone(), None if head.bias is None else head.bias[:-1].clone())
        return model

    def select(self, workbench: Any) -> Mask:
        return {name: p.requires_grad for name, p in workbench.model.named_parameters()}

    def _head(self, model: nn.Module) -> nn.Linear:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise BadModel(
                "expected a linear layer that makes the logits, found none; "
                "choose a method that needs no extra output, such as boundary_shrink"
            )
        return linear[-1]

    @staticmethod
    def _resize(head: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        head.weight, head.out_features = nn.Parameter(weight.detach()), weight.shape[0]
        if bias is not None:
            head.bias = nn.Parameter(bias.detach())

    def __str__(self) -> str:
        return "all and one output more"


def expanded() -> Scope:
    """All weights, and an extra output of the last linear layer that is deleted at the end."""
    return Expanded()
