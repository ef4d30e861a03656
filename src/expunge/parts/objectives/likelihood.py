"""Raise or lower the likelihood of the data's own answers."""

from __future__ import annotations

from dataclasses import dataclass

from expunge.parts.objectives.base import Objective
from expunge.parts.step import Step
from expunge.tasks.base import PerExample


@dataclass(frozen=True)
class Fit(Objective):
    def __call__(self, step: Step) -> PerExample:
        return step.loss

    def __str__(self) -> str:
        return "loss"


@dataclass(frozen=True)
class Ascend(Objective):
    cap: float | None = None

    def __call__(self, step: Step) -> PerExample:
        loss = step.loss if self.cap is None else step.loss.clamp(max=self.cap)
        return -loss

    def __str__(self) -> str:
        return "-loss" if self.cap is None else f"-min(loss,{self.cap:g})"


def fit() -> Objective:
    """Minimise the task's loss: ordinary training."""
    return Fit()


def ascend(cap: float | None = None) -> Objective:
    """Maximise the task's loss, unbounded as in NegGrad, or only up to `cap` nats, above which the gradient is zero."""
    return Ascend(cap)
