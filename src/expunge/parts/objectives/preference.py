"""Negative preference optimisation on any task's log-likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from expunge.errors import BadSetting
from expunge.parts.objectives.base import Objective
from expunge.parts.step import Step
from expunge.tasks.base import PerExample


def npo_loss(log_likelihood: PerExample, reference_log_likelihood: PerExample, beta: float) -> PerExample:
    """-(2/beta) log sigmoid(-beta (log p - log p_ref)), (B,) each (Zhang et al., 2404.05868, eq. 3).

    Its gradient is 2 p^beta / (p^beta + p_ref^beta) times ascent's, so beta -> 0 is ascent.
    """
    return -(2.0 / beta) * F.logsigmoid(-beta * (log_likelihood - reference_log_likelihood))


@dataclass(frozen=True)
class NPO(Objective):
    beta: float = 0.1
    reference: str = "original"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise BadSetting(f"expected beta > 0, found {self.beta}; the limit beta -> 0 is ascend()")

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "log_likelihood"),)

    def __call__(self, step: Step) -> PerExample:
        own = step.task.log_likelihood(step.output, step.batch)
        return npo_loss(own, step.references.log_likelihood(self.reference, step.batch, step.split), self.beta)

    def __str__(self) -> str:
        return f"npo(β={self.beta:g})"


def npo(beta: float = 0.1, reference: str = "original") -> Objective:
    """Lower the likelihood of the forget answers relative to a frozen model; bounded, unlike ascent."""
    return NPO(beta, reference)
