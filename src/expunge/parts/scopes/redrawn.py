"""A scope whose weights are drawn anew before the first step, and then trained: nothing they knew is left in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.parts.scopes.base import Mask, Scope
from expunge.seeds import derive


@dataclass(frozen=True)
class Redrawn(Scope):
    """The inner scope's weights, taken from a fresh model of the case (`case.fresh`) before the first step."""

    inner: Scope

    @torch.no_grad()
    def select(self, workbench: Any) -> Mask:
        mask = self.inner.select(workbench)
        fresh = dict(workbench.case.fresh(derive(workbench.seed, "redrawn")).named_parameters())
        for name, p in workbench.model.named_parameters():
            live = mask[name]
            if isinstance(live, Tensor):
                p.copy_(torch.where(live, fresh[name].to(p), p))
            elif live:
                p.copy_(fresh[name])
        return mask

    def __str__(self) -> str:
        return f"redrawn {self.inner}"


def redrawn(scope: Scope) -> Scope:
    """Draw the weights of this scope anew, then let them, and only them, move."""
    return Redrawn(scope)
