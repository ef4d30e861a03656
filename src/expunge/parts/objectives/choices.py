"""Objectives made of a function of every choice: one choice per example of a classifier, one per answer token in language.

    objective_i = mean over the choices of example i of function(logits, answer)

Averaging comes in two ways. `examples` weights every example alike. `tokens` multiplies an example's mean by n_i B / sum n,
so that the mean over the batch is the mean over all its tokens: what transformers' own loss is, and what most language
papers mean by CE. With one choice per example both are the same. (Where several processes share a batch, each counts its
own tokens.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from expunge.errors import BadSetting
from expunge.parts.objectives import choice_losses
from expunge.parts.objectives.base import Objective
from expunge.parts.step import Step
from expunge.tasks.base import Choice, PerExample

AVERAGES = ("examples", "tokens")


def check_average(average: str) -> None:
    if average not in AVERAGES:
        raise BadSetting(f"expected average to be one of {', '.join(AVERAGES)}, found {average!r}; use one of them")


def averaged(value: PerExample, count: Tensor, average: str, step: Step) -> PerExample:
    """(B,) means over each example's choices -> the same, weighted so that the mean over the batch is the mean over
    `average`. count: (B,) choices of each example; of several processes, the batch is that of all."""
    if average == "examples":
        return value
    count = count.to(value)
    return value * (count / step.mean(count).clamp_min(1 / len(count)))


@dataclass(frozen=True)
class AtChoices(Objective):
    """function: (logits (N, K), answers (N,)[, reference's logits]) -> (N,). settings: its keyword arguments.

    skip: the first so many choices of an example do not count (its last one always does)."""

    function: Choice
    settings: tuple[tuple[str, float], ...] = ()
    reference: str | None = None
    average: str = "examples"
    skip: int = 0

    def __post_init__(self) -> None:
        check_average(self.average)
        if self.skip < 0:
            raise BadSetting(f"expected skip >= 0, found {self.skip}; give the number of first tokens to leave out")

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "output"),) if self.reference else ()

    def __call__(self, step: Step) -> PerExample:
        task, count = step.task, step.task.choices(step.batch)
        other = step.reference_output(self.reference) if self.reference else None
        at = partial(self.function, **dict(self.settings))
        if not self.skip:
            return averaged(task.per_choice(at, step.output, step.batch, other), count, self.average, step)
        table = task.per_choice(at, step.output, step.batch, other, reduce="none")
        first = torch.minimum(torch.full_like(count, self.skip), count - 1)
        kept = torch.arange(table.shape[1], device=table.device)[None] >= first[:, None]
        rest = count - first
        return averaged(torch.where(kept, table, 0.0).sum(1) / rest, rest, self.average, step)

    def __str__(self) -> str:
        inner = ", ".join(f"{name}={value:g}" for name, value in self.settings)
        name = getattr(self.function, "__name__", "function")
        return f"{name}({inner})" if inner else name


def at_choices(
    function: Choice, reference: str | None = None, average: str = "examples", skip: int = 0, **settings: float
) -> Objective:
    """Minimise any pure row-wise function of (logits, answers[, reference's logits]) at every choice."""
    return AtChoices(function, tuple(settings.items()), reference, average, skip)


def inverted_hinge(average: str = "examples") -> Objective:
    """Lower the answer and raise its runner-up (LoKU's IHL)."""
    return at_choices(choice_losses.inverted_hinge, average=average)


def weighted_ascent(beta: float = 1.0, average: str = "examples") -> Objective:
    """Ascent weighted by p^beta at every choice (WGA)."""
    return at_choices(choice_losses.weighted_ascent, average=average, beta=beta)


def satimp(beta1: float = 5.0, beta2: float = 1.0, average: str = "examples") -> Objective:
    """Ascent weighted by p^beta1 (1-p)^beta2 at every choice (SatImp)."""
    return at_choices(choice_losses.satimp, average=average, beta1=beta1, beta2=beta2)


def ceu(skip: int = 1, average: str = "examples") -> Objective:
    """Towards the model's own distribution without the answer (CE-U). skip: first answer tokens that do not count."""
    return at_choices(choice_losses.ceu, average=average, skip=skip)


def unlikelihood(threshold: float = -5.0, average: str = "examples") -> Objective:
    """Raise log(1 - p) where log p is at least `threshold` (LAT's `away`)."""
    return at_choices(choice_losses.unlikelihood, average=average, threshold=threshold)


def undial(beta: float = 10.0, reference: str = "original", average: str = "examples") -> Objective:
    """Match a frozen model's choices with the answer's logit lowered by beta (UNDIAL)."""
    return at_choices(choice_losses.undial, reference, average, beta=beta)


def flatten_logits(average: str = "examples") -> Objective:
    """Draw the largest logit to the mean of all (PDU)."""
    return at_choices(choice_losses.flatness, average=average)


def from_uniform(average: str = "examples") -> Objective:
    """Towards the uniform distribution over all answers."""
    return at_choices(choice_losses.from_uniform, average=average)
