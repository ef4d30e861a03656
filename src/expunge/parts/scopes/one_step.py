"""A scope under which a denoiser is trained, and comes back, as a one-step generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from expunge.parts.scopes.base import Mask, Scope
from expunge.parts.scopes.component import component
from expunge.tasks.denoiser import Denoiser
from expunge.tasks.one_step import OneStep, timestep_of


@dataclass(frozen=True)
class AsOneStep(Scope):
    """The denoising network, asked once at the timestep whose noise is `sigma` times its signal. What comes back is a `OneStep`, a
    `Denoiser` of the same keys."""

    sigma: float = 2.5
    comparable = False  # asked once, from noise alone: at other timesteps it denoises nothing

    def enter(self, model: nn.Module, workbench: Any) -> nn.Module:
        if isinstance(model, OneStep):
            return model
        assert isinstance(model, Denoiser)
        return OneStep.around(model, timestep_of(model, self.sigma))

    def select(self, workbench: Any) -> Mask:
        return component("network").select(workbench)

    def __str__(self) -> str:
        return f"G at σ={self.sigma:g}"


def as_one_step(sigma: float = 2.5) -> Scope:
    """Train the network as a one-step generator."""
    return AsOneStep(sigma)
