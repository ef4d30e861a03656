"""Balances in which one loss is a constraint on the step of another: gradient surgery, a value-function multiplier, a memory of
gradients.

    preserve()      g_u - strength <g_u, g_r>- / |g_r|^2 g_r, tensor by tensor, and only that is stepped        DoCo
    value_bound()   g_r + max(0, eta - cos(g_r, g_f)) g_f                                                       EraseDiff
    remembered()    g + M' v, v >= margin, so that <g, m> >= 0 for every gradient m in a memory M               GEM, Scissorhands
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.errors import BadSetting
from expunge.parts.balances import ALONE, Around, Balance
from expunge.parts.objectives.base import Objective
from expunge.seeds import generator


@dataclass(frozen=True)
class Preserve(Balance):
    """DoCo's concept-preserving gradient (2405.15304). The last term's gradient g_r is protected and never stepped itself; the
    sum of the others, g_u, loses in each tensor what opposes it. Both are clipped to a joint norm first.

    released: the official code's scaling, which leaves the factor |g_u| out (g_u - strength cos(g_u, g_r) g_r / |g_r|): it takes
    away too much where |g_u| < 1.
    """

    strength: float = 1.0
    clip: float | None = 1.0
    released: bool = False

    def combine(self, gradients: Tensor, names: list[str], around: Around = ALONE) -> Tensor:
        if len(gradients) < 2:
            raise BadSetting(
                f"expected a term to move and, last, a term to protect, found {len(gradients)}; give the plan both, or drop the "
                "balance"
            )
        move, guard = self._clipped(gradients[:-1].sum(0)), self._clipped(gradients[-1])
        parts = []
        for g_u, g_r in zip(move.split(around.sizes), guard.split(around.sizes), strict=True):
            unit = g_r / (g_r.norm() + 1e-8)
            overlap = torch.dot(g_u / (g_u.norm() + 1e-8) if self.released else g_u, unit)
            parts.append(g_u - self.strength * overlap * unit if overlap < 0 else g_u)
        return torch.cat(parts)

    def _clipped(self, gradient: Tensor) -> Tensor:
        return gradient if self.clip is None else gradient * min(1.0, self.clip / (float(gradient.norm()) + 1e-6))

    def __str__(self) -> str:
        return f"preserve({'released' if self.released else f'{self.strength:g}'})"


@dataclass(frozen=True)
class ValueBound(Balance):
    """EraseDiff's multiplier (2401.05779, after BOME, 2209.08709): descend the kept loss, plus the rest by
    max(0, eta - cos(g_keep, g_rest)).

    The constraint is q = L_f(theta) - L_f*, where L_f* is the loss after some inner steps from theta; it is a number, so q's
    gradient is that of L_f, whatever the inner steps were, and this balance needs none.
    """

    eta: float = 0.1
    keep: str = "retain"

    def combine(self, gradients: Tensor, names: list[str], around: Around = ALONE) -> Tensor:
        kept = torch.tensor([name == self.keep for name in names], device=gradients.device)
        g, q = gradients[kept].sum(0), gradients[~kept].sum(0)
        return g + self.multiplier(g, q) * q

    def multiplier(self, g: Tensor, q: Tensor) -> float:
        """0 or more. g, q: (P,) gradients of the kept loss and of the constraint."""
        if not bool(q.any()):
            return 0.0
        cosine = float(torch.dot(g, q) / (g.norm() * q.norm()).clamp_min(1e-30))
        return max(0.0, self.eta - cosine)

    def __str__(self) -> str:
        return f"value_bound({self.eta:g})"


@dataclass(frozen=True)
class Remembered(Balance):
    """Gradient episodic memory (Lopez-Paz and Ranzato, 1706.08840): the sum of the terms' gradients, moved as little as it takes
    to oppose none of `size` gradients of `objective` taken before the first step, one per batch of the forget split.

    margin: least weight of each remembered gradient once one is opposed. every: looked at in every so many updates.
    """

    objective: Objective
    size: int = 1
    every: int = 10
    margin: float = 0.5
    batch_size: int = 16

    def prepare(self, workbench: Any, parameters: list[Tensor]) -> Tensor:
        """(size, P) the remembered gradients."""
        split, rows = workbench.splits["forget"], []
        for number in range(self.size):
            rng = generator(workbench.seed, "remembered", number)
            batch = workbench.fill(split.data.fetch(split.order(rng, self.batch_size)[0]))
            step = workbench.step(workbench.task.prepare(batch, rng), "forget", self.objective)
            found = torch.autograd.grad(self.objective(step).mean(), parameters, allow_unused=True)
            pairs = zip(found, parameters, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs]))
        return torch.stack(rows)

    def combine(self, gradients: Tensor, names: list[str], around: Around = ALONE) -> Tensor:
        g, memory = gradients.sum(0), around.memory
        if around.update % self.every or bool((memory @ g >= 0).all()):
            return g
        weights = torch.as_tensor(dual_weights(memory, g, self.margin), dtype=g.dtype, device=g.device)
        return g + weights @ memory

    def __str__(self) -> str:
        return f"remembered({self.size}, every {self.every})"


def dual_weights(memory: Tensor, gradient: Tensor, margin: float = 0.0) -> np.ndarray:
    """(t,) v >= margin that minimises 1/2 |M' v + g|^2, the dual of GEM's projection; memory (t, P), gradient (P,).

    By non-negative least squares in v - margin, on a Cholesky factor of M M'. Its ridge is relative: the official 1e-3 is larger
    than M M' itself where gradients are small, and the constraint would be missed.
    """
    from scipy.optimize import nnls

    rows, g = memory.double().cpu(), gradient.double().cpu()
    inner = (rows @ rows.T).numpy()
    inner += np.eye(len(inner)) * 1e-9 * max(np.trace(inner) / len(inner), 1e-30)
    factor = np.linalg.cholesky(inner)
    target = np.linalg.solve(factor, -(rows @ g).numpy() - inner @ np.full(len(inner), margin))
    return nnls(factor.T, target)[0] + margin


def preserve(strength: float = 1.0, clip: float | None = 1.0, released: bool = False) -> Balance:
    """Step the other terms' gradient alone, without what in a tensor opposes the last term's (DoCo). clip: norm of each before."""
    return Preserve(strength, clip, released)


def value_bound(eta: float = 0.1, keep: str = "retain") -> Balance:
    """Descend the loss on `keep`, and the other terms by max(0, eta - cosine of the two gradients) (EraseDiff)."""
    return ValueBound(eta, keep)


def remembered(
    objective: Objective, size: int = 1, every: int = 10, margin: float = 0.5, batch_size: int = 16
) -> Balance:
    """Never move against gradients of an objective on the forget rows, taken before the first step (GEM)."""
    return Remembered(objective, size, every, margin, batch_size)
