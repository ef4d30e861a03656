"""Preferences on any task's log-likelihood: this answer less (NPO, SimNPO), that one rather than this (DPO, KTO).

One family: a sigmoid brake on how much less likely the answer has become. NPO and DPO compare sums over an answer's tokens
with a frozen model's; SimNPO compares the mean per token with a constant, and needs no frozen model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from expunge.errors import BadSetting
from expunge.parts.alternates import Writing, written
from expunge.parts.objectives.base import Objective, answered
from expunge.parts.step import Step
from expunge.tasks.base import PerExample, evaluating


def npo_loss(log_likelihood: PerExample, reference_log_likelihood: PerExample, beta: float) -> PerExample:
    """-(2/beta) log sigmoid(-beta (log p - log p_ref)), (B,) each (Zhang et al., 2404.05868, eq. 3).

    Its gradient is 2 p^beta / (p^beta + p_ref^beta) times ascent's, so beta -> 0 is ascent.
    """
    return -(2.0 / beta) * F.logsigmoid(-beta * (log_likelihood - reference_log_likelihood))


def simnpo_loss(loss: PerExample, beta: float, delta: float = 0.0) -> PerExample:
    """-(2/beta) log sigmoid(beta (S/n - delta)), (B,); loss: (B,) S/n, nats per token (Fan et al., 2410.07163).

    delta is inside, multiplied by beta, as in every released code; the paper's gamma is beta * delta."""
    return -(2.0 / beta) * F.logsigmoid(beta * (loss - delta))


def dpo_loss(chosen: PerExample, rejected: PerExample, beta: float) -> PerExample:
    """-(2/beta) log sigmoid(beta (chosen - rejected)), (B,); both are log p - log p_reference of a whole answer (Rafailov et
    al., 2305.18290, scaled by 2/beta as NPO does). With chosen = 0 it is NPO."""
    return -(2.0 / beta) * F.logsigmoid(beta * (chosen - rejected))


def kto_loss(chosen: PerExample, rejected: PerExample, beta: float) -> PerExample:
    """1 - (2/beta) sigmoid(K - beta rejected), (B,), with K the batch mean of `chosen` without gradient: the KTO-like loss of
    NPO's official code, whose forget term alone is trained (2404.05868)."""
    return 1 - (2.0 / beta) * torch.sigmoid(chosen.detach().mean() - beta * rejected)


def _check_beta(beta: float, limit: str) -> None:
    if beta <= 0:
        raise BadSetting(f"expected beta > 0, found {beta}; the limit beta -> 0 is {limit}")


@dataclass(frozen=True)
class NPO(Objective):
    beta: float = 0.1
    reference: str = "original"

    def __post_init__(self) -> None:
        _check_beta(self.beta, "ascend()")

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "log_likelihood"),)

    def __call__(self, step: Step) -> PerExample:
        own = step.task.log_likelihood(step.output, step.batch)
        return npo_loss(own, step.references.log_likelihood(self.reference, step.batch, step.split), self.beta)

    def __str__(self) -> str:
        return f"npo(β={self.beta:g})"


@dataclass(frozen=True)
class SimNPO(Objective):
    beta: float = 4.5
    delta: float = 0.0

    def __post_init__(self) -> None:
        _check_beta(self.beta, "ascend()")

    def __call__(self, step: Step) -> PerExample:
        return simnpo_loss(step.loss, self.beta, self.delta)

    def __str__(self) -> str:
        return f"simnpo(β={self.beta:g}{f', δ={self.delta:g}' if self.delta else ''})"


@dataclass(frozen=True)
class Prefer(Objective):
    """Another answer to the same question rather than the example's own, both relative to a frozen model."""

    beta: float = 0.1
    policy: str = "refusal"
    form: str = "dpo"
    reference: str = "original"
    writing: Writing | None = None

    def __post_init__(self) -> None:
        _check_beta(self.beta, "relabel() with ascend()")
        if self.form not in PREFERENCES:
            raise BadSetting(f"expected a form, one of {', '.join(PREFERENCES)}, found {self.form!r}; use one of them")

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "log_likelihood"),)

    def prepare(self, workbench: Any, split: str) -> Any:
        """Where other answers are to be written: row number -> answers, by the model that the request came with."""
        if self.writing is None:
            return None
        with evaluating(workbench.original):
            return written(workbench.task, workbench.original, workbench.splits[split], workbench.seed, self.writing)

    def __call__(self, step: Step) -> PerExample:
        task, batch = step.task, step.batch
        if self.writing is not None:
            batch = batch.with_columns(_alternates=step.scratch["memory"])
        other = task.relabel(batch, step.rng, self.policy)
        with torch.no_grad():
            before = task.log_likelihood(step.references.fresh(self.reference, other), other)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.form == "dpo"):
            chosen = task.log_likelihood(answered(step, other), other) - before
        own = task.log_likelihood(step.output, step.batch)
        rejected = own - step.references.log_likelihood(self.reference, step.batch, step.split)
        return PREFERENCES[self.form](chosen, rejected, self.beta)

    def __str__(self) -> str:
        return f"{self.form}({'written' if self.writing else self.policy}, β={self.beta:g})"


PREFERENCES = {"dpo": dpo_loss, "kto": kto_loss}


def npo(beta: float = 0.1, reference: str = "original") -> Objective:
    """Lower the likelihood of the forget answers relative to a frozen model; bounded, unlike ascent."""
    return NPO(beta, reference)


def simnpo(beta: float = 4.5, delta: float = 0.0) -> Objective:
    """NPO without a frozen model: the brake acts on the mean per token, so that long answers are not braked at once."""
    return SimNPO(beta, delta)


def dpo(
    beta: float = 0.1, policy: str = "refusal", reference: str = "original", writing: Writing | None = None
) -> Objective:
    """Prefer an answer drawn by `task.relabel(policy)`, anew at every step, to the example's own. writing: with the policy
    "alternates", the model writes these answers first (`parts.alternates`)."""
    return Prefer(beta, policy, "dpo", reference, writing)


def kto(beta: float = 0.1, policy: str = "refusal", reference: str = "original") -> Objective:
    """The example's own answer less, against how the drawn answers have moved on average."""
    return Prefer(beta, policy, "kto", reference)
