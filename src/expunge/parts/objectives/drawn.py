"""An objective on images that the original draws itself, for conditions made from the rows' own: anchors, surrogates, replay.

drawn("red -> plain", redirect("own", source="plain -> red"))      Concept Ablation
drawn("red -> plain", fit())                                       its retain term
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from expunge.cases.data import Split, TensorData
from expunge.parts.objectives.base import Objective
from expunge.parts.objectives.likelihood import Fit
from expunge.parts.objectives.wrapped import Wrapped
from expunge.parts.step import Step
from expunge.seeds import derive
from expunge.tasks.base import PerExample
from expunge.tasks.sampling import Sampling

_BANKS: WeakKeyDictionary[Any, dict[Any, tuple[Tensor, Tensor]]] = WeakKeyDictionary()
"""Of one run: two terms on the same images draw them once."""


@dataclass(frozen=True)
class Drawn(Wrapped):
    rule: str = "null"
    count: int = 200
    sampling: Sampling = Sampling(steps=25, guidance=6.0, eta=1.0)

    def prepare(self, workbench: Any, split: str) -> Any:
        return self.bank(workbench, split), self.inner.prepare(workbench, split)

    def bank(self, workbench: Any, split: str) -> tuple[Tensor, Tensor]:
        """(images or latents (count, ...), conditions): `count` by the original, for the split's conditions under the rule."""
        task, model = workbench.task, workbench.references.model("original")
        made = _BANKS.setdefault(workbench, {})
        key = (self.rule, self.count, self.sampling, split)
        if key not in made:
            rows = workbench.splits[split].ids
            ids = rows[_spread(len(rows), self.count)]
            batch = workbench.fill(workbench.splits[split].data.fetch(ids))
            conditions = task.condition(batch if self.rule == "own" else task.conditioned(model, batch, self.rule))
            made[key] = task.drawn(model, conditions.cpu(), self.sampling, derive(workbench.seed, "drawn", self.rule))
        return made[key]

    def __call__(self, step: Step) -> PerExample:
        (latents, conditions), memory = step.scratch["memory"]
        task: Any = step.task
        chosen = torch.randint(0, len(latents), (len(step.batch),), generator=step.rng)
        clean = step.batch[task.input]
        batch = task.with_condition(step.batch, conditions[chosen].to(clean.device))
        inner = step.again()
        inner.batch = batch.with_columns(**{task.input: latents[chosen].to(clean)})
        inner.scratch = {"memory": memory}
        return self.inner(inner)

    def __str__(self) -> str:
        return f"{self.inner} on images drawn for ({self.rule})"


def _spread(rows: int, count: int) -> Tensor:
    """(count,) places: every row in turn, or, where fewer are asked, rows evenly apart: tables may be sorted by condition."""
    return torch.arange(count) % rows if count > rows else torch.arange(count) * rows // count


@dataclass(frozen=True)
class AskedAs(Wrapped):
    rule: str = "null"

    def __call__(self, step: Step) -> PerExample:
        task: Any = step.task
        inner = step.again()
        inner.batch = task.conditioned(step.model, step.batch, self.rule)
        inner.scratch = {"memory": step.scratch.get("memory")}
        return self.inner(inner)

    def __str__(self) -> str:
        return f"{self.inner} asked as ({self.rule})"


def asked_as(rule: str, inner: Objective) -> Objective:
    """`inner` under the condition that a rule puts in place of each row's own: asked_as("plain -> red", fit())."""
    return AskedAs(inner, rule)


def drawn(rule: str, inner: Objective, count: int = 200, sampling: Sampling | None = None) -> Objective:
    """`inner` on images that the original draws for the split's conditions under a rule, instead of on the split's images.

    rule: see `tasks.conditions`; "own": the rows' own conditions. sampling: default 25 steps, guidance 6, eta 1 (Concept
    Ablation's anchors)."""
    return Drawn(inner, rule, count, sampling or Sampling(steps=25, guidance=6.0, eta=1.0))


@dataclass(frozen=True)
class DrawnRows:
    """A split of images that the original draws for the conditions of another, for what reads splits (a Fisher estimate)."""

    of: str
    count: int
    sampling: Sampling

    def __call__(self, workbench: Any) -> Split:
        latents, conditions = Drawn(Fit(), "own", self.count, self.sampling).bank(workbench, self.of)
        task = workbench.task
        name = task.labels if conditions.dim() == 1 else task.prompts
        columns: dict[str, Any] = {task.input: latents.cpu(), name: conditions.cpu()}
        table = TensorData(**columns)
        return Split(f"drawn {self.of}", table, torch.arange(len(table)))
