"""Stay near, or move away from, what a frozen model says or computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.errors import BadSetting
from expunge.parts.objectives.base import Objective
from expunge.parts.step import Step
from expunge.tasks.base import PerExample


@dataclass(frozen=True)
class Match(Objective):
    reference: str = "original"
    temperature: float = 1.0
    away: bool = False

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "output"),)

    def __call__(self, step: Step) -> PerExample:
        target = step.reference_output(self.reference)
        value = step.task.divergence(step.output, target, step.batch, self.temperature)
        value = value * self.temperature**2
        return -value if self.away else value

    def __str__(self) -> str:
        t = "" if self.temperature == 1.0 else f", T={self.temperature:g}"
        return f"{'-' if self.away else ''}D({self.reference}‖model{t})"


@dataclass(frozen=True)
class MatchFeatures(Objective):
    reference: str = "original"
    layers: tuple[str, ...] = ()
    distance: str = "attention"

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES:
            raise BadSetting(
                f"expected a distance, one of {', '.join(DISTANCES)}, found {self.distance!r}; use one of them"
            )

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "features"),)

    def __call__(self, step: Step) -> PerExample:
        own, other = step.features, step.reference_features(self.reference)
        distance = DISTANCES[self.distance]
        return torch.stack([distance(own[name], other[name]) for name in self.layers]).sum(0)

    def __str__(self) -> str:
        return f"{self.distance}({self.reference}; {','.join(self.layers)})"


def attention(activation: Tensor) -> Tensor:
    """Attention map of an activation: (B, C, H, W) -> (B, H*W), mean over channels of a^2; (B, D) -> (B, D), a^2;
    normalised to unit length (Zagoruyko and Komodakis, 2017)."""
    squared = activation.square()
    flat = squared.mean(1).flatten(1) if activation.dim() > 2 else squared
    return F.normalize(flat, dim=1)


def _attention_distance(a: Tensor, b: Tensor) -> PerExample:
    return (attention(a) - attention(b)).square().mean(1)


def _squared_distance(a: Tensor, b: Tensor) -> PerExample:
    return (a - b).square().flatten(1).mean(1)


def _cosine_distance(a: Tensor, b: Tensor) -> PerExample:
    return 1 - F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


DISTANCES = {"attention": _attention_distance, "squared": _squared_distance, "cosine": _cosine_distance}


def match(reference: str = "original", temperature: float = 1.0) -> Objective:
    """Minimise the task's divergence from a frozen model, KL_T(reference || model) * T^2 for classifiers."""
    return Match(reference, temperature)


def leave(reference: str = "original", temperature: float = 1.0) -> Objective:
    """Maximise that divergence (SCRUB's forget step)."""
    return Match(reference, temperature, away=True)


def match_features(
    layers: tuple[str, ...] | list[str], reference: str = "original", distance: str = "attention"
) -> Objective:
    """Minimise the distance of activations at `layers`, summed over layers; distance: attention, squared or cosine."""
    return MatchFeatures(reference, tuple(layers), distance)
