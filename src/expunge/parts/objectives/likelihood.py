"""Raise or lower the likelihood of the data's own answers."""

from __future__ import annotations

from dataclasses import dataclass

from expunge.parts.objectives.base import Objective
from expunge.parts.objectives.choices import averaged, check_average
from expunge.parts.step import Step
from expunge.tasks.base import PerExample


@dataclass(frozen=True)
class Fit(Objective):
    average: str = "examples"

    def __post_init__(self) -> None:
        check_average(self.average)

    def __call__(self, step: Step) -> PerExample:
        return _weighted(step.loss, step, self.average)

    def __str__(self) -> str:
        return "loss"


@dataclass(frozen=True)
class Ascend(Objective):
    cap: float | None = None
    average: str = "examples"

    def __post_init__(self) -> None:
        check_average(self.average)

    def __call__(self, step: Step) -> PerExample:
        loss = step.loss if self.cap is None else step.loss.clamp(max=self.cap)
        return -_weighted(loss, step, self.average)

    def __str__(self) -> str:
        return "-loss" if self.cap is None else f"-min(loss,{self.cap:g})"


def _weighted(loss: PerExample, step: Step, average: str) -> PerExample:
    return loss if average == "examples" else averaged(loss, step.task.choices(step.batch), average, step)


def fit(average: str = "examples") -> Objective:
    """Minimise the task's loss: ordinary training. average: over "examples", or over the "tokens" of the whole batch."""
    return Fit(average)


def ascend(cap: float | None = None, average: str = "examples") -> Objective:
    """Maximise the task's loss, unbounded as in NegGrad, or only up to `cap` nats, above which the gradient is zero.
    average: over "examples", or over the "tokens" of the whole batch; the cap is each example's in both."""
    return Ascend(cap, average)
