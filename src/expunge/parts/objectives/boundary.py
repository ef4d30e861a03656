"""Forget across the decision boundary: fit the class next door, or one that does not exist (Chen et al., CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.errors import BadSetting
from expunge.parts.adversaries import InputAttack
from expunge.parts.objectives.base import Objective
from expunge.parts.step import Step
from expunge.seeds import generator
from expunge.tasks.base import Batch, PerExample, evaluating

NO_NEIGHBOUR = -1


@dataclass(frozen=True)
class NearestClass(Objective):
    """Fit y' = argmax f_o(x'), x' the worst input near x. Found once, on the model as it is before the first step.

    misses, where f_o(x') is still the true class: "again" attacks harder (radius doubled up to `retries` times, 10
    PGD steps) and drops what still misses; "drop" leaves them out of the mean; "keep" fits the true class, which
    relearns what must go (the official code).
    """

    radius: float = 0.1
    steps: int = 1
    low: float | None = 0.0
    high: float | None = 1.0
    misses: str = "again"
    retries: int = 4

    def __post_init__(self) -> None:
        if self.misses not in ("again", "drop", "keep"):
            raise BadSetting(f"expected misses to be 'again', 'drop' or 'keep', found {self.misses!r}; choose one")

    def prepare(self, workbench: Any, split: str) -> Tensor:
        """(rows of the table,) the neighbour's class, -1 where there is none; notes the attack's hit rate."""
        rows, task = workbench.splits[split], workbench.task
        table = torch.full((int(rows.ids.max()) + 1,), NO_NEIGHBOUR, dtype=torch.int64, device=workbench.device)
        first = found = 0
        with evaluating(workbench.model):
            torch.set_grad_enabled(True)
            for batch in workbench.batches(rows, 256):
                true = batch[task.labels]
                label = self._attack(workbench, batch, split, 0)
                hit = label != true
                first += int(hit.sum())
                for retry in range(1, self.retries + 1) if self.misses == "again" else ():
                    if bool(hit.all()):
                        break
                    label = torch.where(hit, label, self._attack(workbench, batch, split, retry))
                    hit = label != true
                found += int(hit.sum())
                table[batch.ids] = label if self.misses == "keep" else torch.where(hit, label, NO_NEIGHBOUR)
        workbench.note("boundary_hit_rate", first / len(rows))
        workbench.note("boundary_rows_with_neighbour", found / len(rows))
        return table

    def _attack(self, workbench: Any, batch: Batch, split: str, retry: int) -> Tensor:
        steps, radius = (self.steps, self.radius) if retry == 0 else (10, self.radius * 2**retry)
        size = radius if steps == 1 else None
        attack = InputAttack(radius, steps, size, self.low, self.high, on=split)
        step = Step(
            workbench.model,
            workbench.task,
            batch,
            workbench.references,
            generator(workbench.seed, "boundary"),
            split=split,
        )
        near = attack.inputs(step, lambda s: s.loss.mean())
        with torch.no_grad():
            return workbench.task.forward(workbench.model, near).prediction.argmax(-1)

    def __call__(self, step: Step) -> PerExample:
        label = step.scratch["memory"][step.batch.ids]
        live = label != NO_NEIGHBOUR
        batch = step.batch.with_columns(**{step.task.labels: torch.where(live, label, step.batch[step.task.labels])})
        loss = step.task.loss(step.output, batch)
        # a mean over the rows that have a neighbour, whatever else is in the batch
        return torch.where(live, loss, 0.0) * (len(live) / live.sum().clamp_min(1))

    def __str__(self) -> str:
        return f"loss(nearest class, ε={self.radius:g})"


@dataclass(frozen=True)
class LastOutput(Objective):
    def __call__(self, step: Step) -> PerExample:
        prediction = step.output.prediction
        labels = torch.full_like(step.batch[step.task.labels], prediction.shape[-1] - 1)
        return step.task.loss(step.output, step.batch.with_columns(**{step.task.labels: labels}))

    def __str__(self) -> str:
        return "loss(class K+1)"


def nearest_class(radius: float = 0.1, steps: int = 1, misses: str = "again", **settings: Any) -> Objective:
    """Fit the class that the original model gives to the worst input within `radius` (steps=1: FGSM; more: PGD)."""
    return NearestClass(radius, steps, misses=misses, **settings)


def last_output() -> Objective:
    """Fit the last output, whatever the true class: with `scope=expanded()` a class that exists only while training."""
    return LastOutput()
