"""How the terms' gradients become one.

`None` in a plan means the weighted sum by one backward pass. The balances here see one flat gradient per term (already
weighted) and return one: surgery, multi-objective aggregators of torchjd, one-sided projection. Balances with a memory of past
gradients or with a multiplier of their own are in `constrained`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge.errors import BadSetting, nearest, need_extra


@dataclass(frozen=True)
class Around:
    """What a balance may know beside the gradients. sizes: numbers of each tensor, in the order of the columns (P in all).
    update: number of this update, from 0. memory: what the balance's `prepare` returned."""

    sizes: tuple[int, ...] = ()
    update: int = 0
    memory: Any = None


ALONE = Around()


class Balance:
    """Base of all balances."""

    def prepare(self, workbench: Any, parameters: list[Tensor]) -> Any:
        """Called once before the first step, with the model as it is then; what it returns is `Around.memory`. parameters: what
        will move, in the order of the columns. A function of the workbench's seed and model only: a resumed run calls it again."""
        return None

    def combine(self, gradients: Tensor, names: list[str], around: Around = ALONE) -> Tensor:
        """(T, P) one row per term -> (P,). names: each term's split."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sum(Balance):
    """The weighted sum, term by term: what `None` does in one backward pass."""

    def combine(self, gradients: Tensor, names: list[str], around: Around = ALONE) -> Tensor:
        return gradients.sum(0)

    def __str__(self) -> str:
        return "sum"


@dataclass(frozen=True)
class Project(Balance):
    """One-sided projection: where a forget gradient opposes the protected one, its opposing part is removed, so that a
    step never raises the protected loss to first order. The protected gradient is stepped as well (`preserve` does not)."""

    protect: str = "retain"

    def combine(self, gradients: Tensor, names: list[str], around: Around = ALONE) -> Tensor:
        keep = torch.tensor([n == self.protect for n in names], device=gradients.device)
        if not keep.any() or keep.all():
            return gradients.sum(0)
        guard, move = gradients[keep].sum(0), gradients[~keep].sum(0)
        overlap = torch.dot(move, guard)
        if overlap < 0:
            move = move - overlap / guard.dot(guard).clamp_min(1e-30) * guard
        return move + guard

    def __str__(self) -> str:
        return f"project({self.protect})"


@dataclass(frozen=True)
class Aggregate(Balance):
    """An aggregator of torchjd: UPGrad, MGDA, PCGrad, CAGrad, AlignedMTL, IMTLG, NashMTL, DualProj, Mean, Sum, ...

    scale: multiplies the result; T (the number of terms) makes UPGrad's average comparable to a sum.
    """

    name: str = "UPGrad"
    scale: float = 1.0
    settings: tuple[tuple[str, Any], ...] = field(default=())

    def combine(self, gradients: Tensor, names: list[str], around: Around = ALONE) -> Tensor:
        aggregation = need_extra("torchjd.aggregation", "multiobjective")
        if not hasattr(aggregation, self.name):
            known = [n for n in dir(aggregation) if n[0].isupper() and not n.endswith("Weighting")]
            raise BadSetting(f"expected an aggregator of torchjd, found '{self.name}'.{nearest(self.name, known)}")
        return getattr(aggregation, self.name)(**dict(self.settings))(gradients) * self.scale

    def __str__(self) -> str:
        return self.name.lower()


def project(protect: str = "retain") -> Balance:
    """Never move against the gradient of the `protect` split's terms."""
    return Project(protect)


def aggregate(name: str = "UPGrad", scale: float = 1.0, **settings: Any) -> Balance:
    """Combine by an aggregator of torchjd, e.g. `aggregate("MGDA")`."""
    return Aggregate(name, scale, tuple(sorted(settings.items())))
