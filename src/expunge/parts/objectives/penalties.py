"""Penalties on the weights themselves. Each is one number for the batch, given to every example, so that a term's mean over
the batch is the penalty and its weight reads against the mean loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from expunge.errors import BadSetting
from expunge.parts.objectives.base import Objective
from expunge.parts.step import Step
from expunge.tasks.base import PerExample


@dataclass(frozen=True)
class Norm(Objective):
    power: int = 1

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise BadSetting(f"expected power 1 or 2, found {self.power}; choose one")

    def __call__(self, step: Step) -> PerExample:
        weights = [p for p in step.model.parameters() if p.requires_grad]
        total = sum((p.abs() if self.power == 1 else p.square()).sum() for p in weights)
        return torch.as_tensor(total, device=step.batch.ids.device).expand(len(step.batch))

    def __str__(self) -> str:
        return f"‖θ‖{'₁' if self.power == 1 else '₂²'}"


@dataclass(frozen=True)
class Anchor(Objective):
    """Distance of the weights from a frozen model's: L1 (soft SalUn's) or squared L2 (EWC without its weights)."""

    power: int = 2
    reference: str = "original"

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "features"),)

    def __call__(self, step: Step) -> PerExample:
        anchor = dict(step.references.model(self.reference).named_parameters())
        total: Any = 0.0
        for name, p in step.model.named_parameters():
            if p.requires_grad:
                delta = p - anchor[name].to(p)
                total = total + (delta.abs() if self.power == 1 else delta.square()).sum()
        return torch.as_tensor(total).expand(len(step.batch))

    def __str__(self) -> str:
        return f"‖θ-θ_{self.reference}‖{'₁' if self.power == 1 else '₂²'}"


def l1() -> Objective:
    """Sum of |theta| over all trainable parameters (weights, biases, norm parameters), by its sub-gradient."""
    return Norm(1)


def l2() -> Objective:
    """Sum of theta^2 over all trainable parameters."""
    return Norm(2)


def anchor(power: int = 2, reference: str = "original") -> Objective:
    """Keep the weights near a frozen model's."""
    return Anchor(power, reference)
