"""Hold a router where it is wanted: the anchor that keeps tokens going to the chosen experts (SEUF, 2411.18797)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from expunge.parts.mixture import mean_over_tokens, mixture_named
from expunge.parts.objectives.base import Objective
from expunge.parts.step import Step
from expunge.tasks.base import PerExample


@dataclass(frozen=True)
class RouterAnchor(Objective):
    """Mean over an example's tokens and over all experts of (s - a)^2, summed over the layers of `chosen`; s is the softmax
    over ALL experts (the top-k gates give the others no gradient), a is 1 at the chosen experts and 0 elsewhere.

    It is zero only where the router is sure of one chosen expert. All tokens of a row are held, prompts too."""

    chosen: tuple[tuple[str, int], ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{name}.input" for name in dict.fromkeys(name for name, _ in self.chosen))

    def __call__(self, step: Step) -> PerExample:
        features, total = step.features, torch.zeros(len(step.batch), device=step.batch.ids.device)
        for layer in self.layers:
            name = layer.removesuffix(".input")
            s: Any = mixture_named(step.model, name).probabilities(step.model, features[layer])
            a = torch.zeros(s.shape[-1], dtype=s.dtype, device=s.device)
            a[[i for own, i in self.chosen if own == name]] = 1.0
            total = total + mean_over_tokens((s - a).square(), step.batch).mean(-1)
        return total

    def __str__(self) -> str:
        return f"‖s-1[{', '.join(f'{name}:{i}' for name, i in self.chosen)}]‖²"


def router_anchor(chosen: tuple[tuple[str, int], ...]) -> Objective:
    """Keep the routers of these (layer, expert) pairs on these experts."""
    return RouterAnchor(tuple(chosen))
