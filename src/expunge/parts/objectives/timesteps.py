"""One example's error over many timesteps: what a Fisher estimate of a diffusion model is taken of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from expunge.parts.step import Step
from expunge.tasks.base import Batch, PerExample

CHUNK = 256
"""Rows that are run together."""


@dataclass(frozen=True)
class OverTimesteps:
    """(B,) an energy for `ewc`: scale * mean over `count` timesteps, one from each `count`-th of the schedule, of the task's loss,
    each with noise of its own. Selective Amnesia's Fisher squares the gradient of this sum, not the sum of squared gradients."""

    count: int = 1000
    scale: float = 1.0

    def __call__(self, step: Step) -> PerExample:
        task: Any = step.task
        size = len(step.batch)
        where = torch.arange(self.count).repeat_interleave(size)
        level = (where + torch.rand(len(where), generator=step.rng)) / self.count
        total: Any = 0.0
        for part in torch.arange(len(where)).split(max(CHUNK // size, 1) * size):
            rows = part % size
            columns = {n: v[rows] if _rowwise(v, size) else v for n, v in step.batch.columns.items()}
            clean = columns[task.latents]
            noise = torch.randn(clean.shape, generator=step.rng).to(clean)
            batch = Batch(step.batch.ids[rows], {**columns, "noise": noise, "level": level[part].to(clean.device)})
            loss = task.loss(task.forward(step.model, batch), batch)
            total = total + loss.view(-1, size).sum(0)
        return self.scale * total / self.count


def _rowwise(value: Any, size: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == size
