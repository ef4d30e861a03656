"""Activations at an example's own answer: steered to a fixed random direction (RMU), or held where a frozen model has them.

Paper: Li et al., "The WMDP Benchmark", ICML 2024, 2403.03218. With h the activation (d,) at a position and P_i the n_i
positions that carry example i's answer,

    forget_i = (1/n_i) sum_{t in P_i} ||h_t - u||^2 / d,   u = c r / ||r||,  r ~ U[0, 1)^d, drawn once
    retain_i = (1/n_i) sum_{t in P_i} ||h_t - h_t^original||^2 / d

Where activations have no positions (a classifier's), d is all of them. The direction is all-positive: a Gaussian one is
another method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.parts.objectives.base import Objective
from expunge.parts.step import Step, capturing
from expunge.seeds import generator
from expunge.tasks.base import PerExample, evaluating


def activation_distance(own: Tensor, other: Tensor, spots: Tensor | None) -> PerExample:
    """(B,) mean squared difference of activations, over each example's own spots.

    own, other: (B, T, d) with spots (B, T) bool, or (B, ...) with spots None; `other` may be (d,) as well."""
    squared = (own - other).square()
    if spots is None:
        return squared.flatten(1).mean(1)
    return (squared.mean(-1) * spots).sum(1) / spots.sum(1).clamp_min(1)


def _own(step: Step, layer: str, spots: Tensor | None) -> Tensor:
    """The activation at a layer; a joint forward of several splits has padded it to the longest of them."""
    found = step.features[layer]
    return found if spots is None else found[:, : spots.shape[1]]


@dataclass(frozen=True)
class Steer(Objective):
    layers: tuple[str, ...]
    strength: float = 2.0

    def prepare(self, workbench: Any, split: str) -> Tensor:
        """The direction u: a function of the workbench's seed and the layer's width."""
        batch = next(iter(workbench.batches(workbench.splits[split], 1)))
        with evaluating(workbench.model), capturing(workbench.model, self.layers) as seen:
            workbench.task.forward(workbench.model, batch)
        activation = seen[self.layers[0]]
        shape = activation.shape[1:] if workbench.task.spots(batch) is None else activation.shape[-1:]
        drawn = torch.rand(shape, generator=generator(workbench.seed, "steer", self.layers[0]))
        return (self.strength * drawn / drawn.norm()).to(activation)

    def __call__(self, step: Step) -> PerExample:
        spots = step.task.spots(step.batch)
        own = _own(step, self.layers[0], spots)
        return activation_distance(own, step.scratch["memory"].to(own), spots)

    def __str__(self) -> str:
        return f"steer({self.layers[0]}, c={self.strength:g})"


@dataclass(frozen=True)
class Hold(Objective):
    layers: tuple[str, ...]
    reference: str = "original"

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "features"),)

    def __call__(self, step: Step) -> PerExample:
        spots, other = step.task.spots(step.batch), step.reference_features(self.reference)
        parts = [activation_distance(_own(step, name, spots), other[name], spots) for name in self.layers]
        return torch.stack(parts).sum(0)

    def __str__(self) -> str:
        return f"hold({','.join(self.layers)})"


def steer(layer: str, strength: float = 2.0) -> Objective:
    """Draw the activations at a layer to one random direction of length `strength`, the same for the whole run."""
    return Steer((layer,), strength)


def hold(layer: str | tuple[str, ...], reference: str = "original") -> Objective:
    """Hold the activations at a layer (or the sum over several) where a frozen model has them."""
    return Hold((layer,) if isinstance(layer, str) else tuple(layer), reference)
