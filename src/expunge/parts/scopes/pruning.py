"""Pruning as a scope: the least important weights become zero, and stay zero through any optimizer.

A scope of this file changes the weights it selects from, once, before the first step. Which weights may be pruned:
those named by `layers`; else all convolution kernels (Liu et al., 2304.04934: head, biases and norm layers
untouched); else, in a model without convolutions, all matrices but the last.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.errors import BadSetting, nearest
from expunge.parts.scopes.base import Mask, Scope, top_share


@dataclass(frozen=True)
class Pruned(Scope):
    """The share `rate` of the prunable weights that scores lowest, in one global ranking, is set to zero and frozen."""

    rate: float = 0.95
    score: Literal["magnitude", "synflow"] = "magnitude"
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise BadSetting(
                f"expected rate in 0..1 (share of weights to prune, below 1), found {self.rate}; correct it"
            )
        if self.score not in ("magnitude", "synflow"):
            raise BadSetting(f"expected score to be 'magnitude' or 'synflow', found {self.score!r}; choose one")

    @torch.no_grad()
    def select(self, workbench: Any) -> Mask:
        model = workbench.model
        weights = prunable(model, self.layers)
        if self.score == "magnitude":
            kept: Mapping[str, Tensor] = top_share({n: w.detach().abs() for n, w in weights.items()}, 1 - self.rate)
        else:
            kept = synflow(workbench, list(weights), self.rate)
        mask: Mask = {n: p.requires_grad for n, p in model.named_parameters()}
        for name, keep in kept.items():
            weights[name].mul_(keep)
            mask[name] = keep if weights[name].requires_grad else False
        return mask

    def __str__(self) -> str:
        return f"pruned({self.rate:g}{'' if self.score == 'magnitude' else ', ' + self.score})"


def prunable(model: nn.Module, patterns: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    """Names and weights that pruning may touch (see the module's text)."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}  # frozen weights stay as they are
    if patterns:
        found = {n: p for n, p in named.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)}
        if not found:
            raise BadSetting(
                f"expected a parameter name that matches {', '.join(patterns)}, found none."
                f"{nearest(patterns[0], named)}"
            )
        return found
    kernels = {n: p for n, p in named.items() if p.dim() > 2}
    matrices = [n for n, p in named.items() if p.dim() == 2]
    found = kernels or {n: named[n] for n in matrices[:-1]}
    if not found:
        raise BadSetting(
            "expected convolution kernels, or matrices beside the last, found none; "
            "name the weights to prune: layers=(...)"
        )
    return found


@torch.no_grad()
def synflow(workbench: Any, names: list[str], rate: float, rounds: int = 100) -> Mapping[str, Tensor]:
    """Masks by SynFlow (Tanaka et al., 2020): R = sum of the outputs on an input of ones with every weight replaced
    by its absolute value; the weights with the lowest |w dR/dw| go, round by round, until 1 - rate are left. No data
    is read but the shape of one retain row. Double precision: R grows exponentially with depth."""
    model = copy.deepcopy(workbench.model).double().eval()
    named = dict(model.named_parameters())
    for p in named.values():
        p.abs_().requires_grad_(True)
    retain, task = workbench.splits["retain"], workbench.task
    batch = workbench.fill(retain.data.fetch(retain.ids[:1]))
    batch = batch.with_columns(**{task.input: torch.ones_like(batch[task.input], dtype=torch.float64)})
    weights = {n: named[n] for n in names}
    masks: dict[str, Tensor] = {}
    for number in range(1, rounds + 1):
        with torch.enable_grad():
            flow = task.forward(model, batch).prediction.sum()
            gradients = torch.autograd.grad(flow, list(weights.values()), allow_unused=True)
        scores = {
            n: (w.detach() * (torch.zeros_like(w) if g is None else g)).abs()
            for (n, w), g in zip(weights.items(), gradients, strict=True)
        }
        if masks:  # what is gone ranks below every live weight, whose score may have become zero
            scores = {n: torch.where(masks[n], s, -1.0) for n, s in scores.items()}
        masks = top_share(scores, (1 - rate) ** (number / rounds))
        for n, w in weights.items():
            w.mul_(masks[n])
    return masks


def pruned(
    rate: float = 0.95, score: Literal["magnitude", "synflow"] = "magnitude", layers: tuple[str, ...] = ()
) -> Scope:
    """Prune this share of the (hidden) weights before the first step and keep them at zero."""
    return Pruned(rate, score, tuple(layers))
