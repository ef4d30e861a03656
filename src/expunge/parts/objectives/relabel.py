"""Fit answers that are not the data's own: random labels, and labels found once for each example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from expunge.errors import BadSetting
from expunge.parts.objectives.base import Objective, answered
from expunge.parts.objectives.choices import averaged, check_average
from expunge.parts.step import Step
from expunge.seeds import generator
from expunge.tasks.base import PerExample


@dataclass(frozen=True)
class Relabel(Objective):
    policy: str = "other"
    draw: str = "step"
    average: str = "examples"

    def __post_init__(self) -> None:
        check_average(self.average)
        if self.draw not in ("step", "once"):
            raise BadSetting(f"expected draw to be 'step' or 'once', found {self.draw!r}; choose one")

    def prepare(self, workbench: Any, split: str) -> Any:
        """With draw="once": a new answer for every row of the split, drawn before the first step."""
        if self.draw == "step":
            return None
        rows = workbench.splits[split]
        rng = generator(workbench.seed, "relabel", split)
        if workbench.task.ragged:  # answers of different lengths: kept row by row
            task = workbench.task
            kept: dict[int, list[int]] = {}
            for batch in workbench.batches(rows, 64):
                new = task.relabel(batch, rng, self.policy)
                kept |= dict(zip(batch.ids.tolist(), task.answer_tokens(new), strict=True))
            return kept
        column = workbench.task.relabelled
        table: torch.Tensor | None = None
        for batch in workbench.batches(rows, 4096):
            new = workbench.task.relabel(batch, rng, self.policy)[column]
            if table is None:
                table = new.new_zeros((int(rows.ids.max()) + 1, *new.shape[1:]))
            table[batch.ids] = new
        return table

    def __call__(self, step: Step) -> PerExample:
        task = step.task
        if self.draw == "step":
            batch = task.relabel(step.batch, step.rng, self.policy)
        elif task.ragged:
            own = step.scratch["memory"]
            batch = task.with_answers(step.batch, [own[row] for row in step.batch.ids.tolist()])  # type: ignore[attr-defined]
        else:
            table = step.scratch["memory"]
            column = task.relabelled
            batch = step.batch.with_columns(**{column: table[step.batch.ids].to(step.batch[column])})
        loss = task.loss(answered(step, batch), batch)
        return loss if self.average == "examples" else averaged(loss, task.choices(batch), self.average, step)

    def __str__(self) -> str:
        return f"relabel({self.policy}{', once' if self.draw == 'once' else ''})"


def relabel(policy: str = "other", draw: str = "step", average: str = "examples") -> Objective:
    """Fit an answer drawn at random (Amnesiac, SalUn's forget term, Gaussian-Amnesiac on regression, refusals in language).

    policy: the task's way to draw, for classification "other" (uniform over the wrong classes) or "uniform" (over all); for
    language "refusal", "other" (another row's answer), "random" (tokens) or "alternates".
    draw: anew at every "step", or "once" per run. average: over "examples", or over the "tokens" of the new answers.
    """
    return Relabel(policy, draw, average)
