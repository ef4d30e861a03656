"""A scope whose weights are drawn anew before the first step, and then trained: nothing they knew is left in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.parts.scopes.base import Mask, Scope
from expunge.seeds import derive, generator


@dataclass(frozen=True)
class Redrawn(Scope):
    """The inner scope's weights are drawn before the first step: as in a fresh model of the case (`case.fresh`), or with a
    `std`, matrices and kernels from a normal distribution cut off at 2 and biases 0 (scales of norms stay).

    moving: what moves afterwards; None: the drawn weights alone.
    """

    inner: Scope
    std: float | None = None
    moving: Scope | None = None

    @torch.no_grad()
    def select(self, workbench: Any) -> Mask:
        mask = self.inner.select(workbench)
        new = self._drawn(workbench)
        for name, p in workbench.model.named_parameters():
            live = mask.get(name, False)
            if isinstance(live, Tensor):
                p.copy_(torch.where(live, new(name, p), p))
            elif live:
                p.copy_(new(name, p))
        return mask if self.moving is None else self.moving.select(workbench)

    def _drawn(self, workbench: Any) -> Callable[[str, Tensor], Tensor]:
        if self.std is None:
            fresh = dict(workbench.case.fresh(derive(workbench.seed, "redrawn")).named_parameters())
            return lambda name, p: fresh[name].to(p)
        rng, std = generator(workbench.seed, "redrawn"), self.std

        def draw(name: str, p: Tensor) -> Tensor:
            if p.dim() > 1:
                return torch.nn.init.trunc_normal_(torch.empty(p.shape), std=std, generator=rng).to(p)
            return torch.zeros_like(p) if name.endswith("bias") else p

        return draw

    def __str__(self) -> str:
        return f"redrawn {self.inner}" + (f", then {self.moving}" if self.moving is not None else "")


def redrawn(scope: Scope, std: float | None = None, moving: Scope | None = None) -> Scope:
    """Draw the weights of this scope anew, then let them, and only them, move; or what `moving` says. std: of new weights from a
    normal distribution; None: as a fresh model has them."""
    return Redrawn(scope, std, moving)
