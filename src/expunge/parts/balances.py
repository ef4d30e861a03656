"""How the terms' gradients become one.

`None` in a plan means the weighted sum by one backward pass. The balances here see one flat gradient per term (already
weighted) and return one: surgery, multi-objective aggregators of torchjd, one-sided projection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expunge.errors import BadSetting, nearest, need_extra


class Balance:
    """Base of all balances."""

    def combine(self, gradients: Tensor, names: list[str]) -> Tensor:
        """(T, P) one row per term -> (P,). names: each term's split."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sum(Balance):
    """The weighted sum, term by term: what `None` does in one backward pass."""

    def combine(self, gradients: Tensor, names: list[str]) -> Tensor:
        return gradients.sum(0)

    def __str__(self) -> str:
        return "sum"


@dataclass(frozen=True)
class Project(Balance):
    """One-sided projection: where a forget gradient opposes the protected one, its opposing part is removed, so that a
    step never raises the protected loss to first order (DoCo's concept-preserving gradient; GEM with one constraint)."""

    protect: str = "retain"

    def combine(self, gradients: Tensor, names: list[str]) -> Tensor:
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

    def combine(self, gradients: Tensor, names: list[str]) -> Tensor:
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
