"""Inputs learned by gradient that stand for data one no longer has (Tarun et al., TNNLS 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.parts.objectives.base import Objective
from expunge.parts.plan import Auxiliary
from expunge.parts.step import Step
from expunge.tasks.base import Batch, PerExample


class LearnedInputs(nn.Module):
    """values (C*n, ...) trainable inputs, labels (C*n,) the class each stands for."""

    def __init__(self, values: Tensor, labels: Tensor):
        super().__init__()
        self.values = nn.Parameter(values)
        self.labels: Tensor
        self.register_buffer("labels", labels)

    def forward(self) -> Tensor:
        return self.values


def class_noise(rows: int = 256, name: str = "noise") -> Auxiliary:
    """`rows` inputs of Gaussian noise for each class that the request names, to be trained in a phase of their own.
    Reads one retain row for its shape, and of the forget rows nothing but which classes they are."""

    def build(case: Any, seed: int) -> LearnedInputs:
        task, retain = case.task, case.split("retain")
        shape = retain.data.fetch(retain.ids[:1])[task.input].shape[1:]
        classes = case.data.column(task.labels)[case.split("forget").ids].unique()
        return LearnedInputs(torch.randn(len(classes) * rows, *shape), classes.repeat_interleave(rows))

    return Auxiliary(name, build)


@dataclass(frozen=True)
class WorstInputs(Objective):
    """-loss(f_o(n), c) + penalty * ||n||^2 for each learned input n of class c: what a frozen model takes for
    anything but c.

    The batch of the split only beats time; nothing of it is read but the task's constants.
    """

    penalty: float = 0.1
    reference: str = "original"

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "features"),)  # the model itself: a gradient goes through it to the inputs

    def __call__(self, step: Step) -> PerExample:
        learned: Any = step.model
        batch = _as_batch(step, learned.values, learned.labels)
        loss = step.task.loss(step.task.forward(step.references.model(self.reference), batch), batch)
        return -loss + self.penalty * learned.values.flatten(1).square().sum(1)

    def __str__(self) -> str:
        return f"-loss(n)+{self.penalty:g}‖n‖²"


@dataclass(frozen=True)
class Beside(Objective):
    """The task's loss on the batch and `rows` learned inputs beside it, in one forward and one mean (a mixed batch)."""

    rows: int
    name: str = "noise"

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.name, "features"),)

    def __call__(self, step: Step) -> PerExample:
        task = step.task
        learned: Any = step.references.model(self.name)
        chosen = torch.randint(len(learned.labels), (self.rows,), generator=step.rng).to(learned.labels.device)
        x = torch.cat([step.batch[task.input], learned.values[chosen].to(step.batch[task.input])])
        y = torch.cat([step.batch[task.labels], learned.labels[chosen]])
        batch = _as_batch(step, x, y)
        return task.loss(task.forward(step.model, batch), batch).mean().expand(len(step.batch))

    def __str__(self) -> str:
        return f"loss(· ∪ {self.rows} {self.name})"


def _as_batch(step: Step, inputs: Tensor, labels: Tensor) -> Batch:
    constants = {k: v for k, v in step.batch.columns.items() if k.startswith("_")}
    columns = {**constants, step.task.input: inputs, step.task.labels: labels}
    return Batch(torch.arange(len(inputs), device=inputs.device), columns)


def worst_inputs(penalty: float = 0.1, reference: str = "original") -> Objective:
    """For the phase that trains `class_noise`: raise the frozen model's loss of the noise's own class."""
    return WorstInputs(penalty, reference)


def beside(rows: int, name: str = "noise") -> Objective:
    """Fit each batch together with this many rows of a trained `class_noise`."""
    return Beside(rows, name)
