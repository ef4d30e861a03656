"""Proximal steps: what a penalty that is not smooth does after each update instead of through the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import BadSetting


class Proximal:
    """Base of all proximal steps."""

    def apply(self, parameters: Sequence[Tensor], anchors: Sequence[Tensor], progress: float) -> None:
        """Change the weights in place. anchors: the weights as they were before the first step of the phase, one per
        parameter. progress: share of all updates done, this one included; 1 after the last."""
        raise NotImplementedError


@dataclass(frozen=True)
class SoftThreshold(Proximal):
    """theta <- theta_o + sign(d) max(|d| - tau_t, 0), d = theta - theta_o: the proximal step of tau_t ||theta -
    theta_o||_1.

    tau_t is the q_t-th smallest |d| over all weights, q_t = share * P * (1 - t/T): after the first update that share
    of the weights is back where it was, after the last none is held (Fan et al., 2310.12508, soft-thresholding
    variant).
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise BadSetting(f"expected share in 0..1 (weights snapped back at first), found {self.share}; correct it")

    @torch.no_grad()
    def apply(self, parameters: Sequence[Tensor], anchors: Sequence[Tensor], progress: float) -> None:
        moved = [p - a for p, a in zip(parameters, anchors, strict=True)]
        sizes = torch.cat([d.abs().reshape(-1) for d in moved])
        rank = int(self.share * sizes.numel() * (1 - progress))
        if rank < 1:
            return
        # on CUDA a selection in one row occupies one block, a sort the whole device
        threshold = sizes.sort().values[rank - 1] if sizes.is_cuda else sizes.kthvalue(rank).values
        for p, a, d in zip(parameters, anchors, moved, strict=True):
            # equal to the formula, and gives the anchor's very bits where the weight snaps back
            p.copy_(torch.where(d.abs() <= threshold, a, a + d.sign() * (d.abs() - threshold)))

    def __str__(self) -> str:
        return f"prox(‖θ-θₒ‖₁, {self.share:g}↓)"


def soft_threshold(share: float = 0.5) -> Proximal:
    """Snap the least moved share of the weights back to the start after each update, fewer as time goes on."""
    return SoftThreshold(share)
