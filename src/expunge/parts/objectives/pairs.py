"""FLAT: away from the true answer and towards another one by an f-divergence, with neither retain data nor a frozen model.

Paper: Wang et al., "LLM Unlearning via Loss Adjustment with Only Forget Data", ICLR 2025, 2410.11143. With P the mean (not the
product) of an answer's token probabilities, y_f the true answer and y_e another one to the same question,

    L = -g*( P(y_e) ) + f*( g*( P(y_f) ) )

Of the eight pairs (g*, f*) in the official code, three are written with g* falling where the f-GAN activations rise, so that
minimising L lowers the other answer, and for two of them even raises the true one. They stand in `MISCODED`, apart from
`DIVERGENCES`. Departure: P is over an answer's own tokens; the code's is over all padded positions, a hidden factor of about
|y| / 500 that makes tanh linear and shrinks the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.errors import BadSetting, nearest
from expunge.parts.objectives import choice_losses
from expunge.parts.objectives.base import Objective, answered
from expunge.parts.step import Step
from expunge.tasks.base import PerExample

Form = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""(g*(v), f*(g*(v))), both of a probability v in 0..1."""

LOG_2 = 0.6931471805599453

DIVERGENCES: dict[str, Form] = {
    "total_variation": (lambda v: torch.tanh(v) / 2, lambda v: torch.tanh(v) / 2),
    "kl": (lambda v: v, lambda v: (v - 1).exp()),
    "jensen_shannon": (lambda v: LOG_2 - F.softplus(-v), lambda v: v + F.softplus(-v) - LOG_2),
    "pearson": (lambda v: v, lambda v: v.square() / 4 + v),
    "jeffrey": (lambda v: v, lambda v: v + v.square() / 4 + v.pow(3) / 16),
}
"""The first four are those with published results; Jeffrey's f* is the official code's series."""

MISCODED: dict[str, Form] = {
    "squared_hellinger": (lambda v: 1 - v.exp(), lambda v: (1 - v.exp()) / v.exp()),
    "reverse_kl": (lambda v: -v.exp(), lambda v: -1 - v),
    "neyman": (lambda v: 1 - v.exp(), lambda v: 2 - 2 * (1 - v).sqrt()),
}
"""As the official code has them. L rises with P(y_e), so the other answer is unlearned; with P(y_f) it falls in the first two,
so the true answer is learned. Neyman's f* is of v, not of g*(v): right in direction, infinite in slope at v = 1."""


def flat_loss(template: Tensor, true: Tensor, form: Form) -> Tensor:
    """-g*(template) + f*(g*(true)), elementwise on probabilities 0..1; template: P(y_e), true: P(y_f)."""
    activation, conjugate = form
    return conjugate(true) - activation(template)


def divergence_form(name: str, as_coded: bool = False) -> Form:
    """The pair of functions of a divergence; a miscoded one only to whoever asks for it `as_coded`."""
    if name in MISCODED and not as_coded:
        raise BadSetting(
            f"expected a divergence whose loss forgets, one of {', '.join(DIVERGENCES)}, found '{name}', whose published "
            "form falls where it should rise: minimising it makes the other answer less likely; choose another, or pass "
            "as_coded=True to reproduce the official code"
        )
    known = DIVERGENCES | MISCODED
    if name not in known:
        raise BadSetting(f"expected a divergence, one of {', '.join(known)}, found '{name}'.{nearest(name, known)}")
    return known[name]


@dataclass(frozen=True)
class Pair(Objective):
    divergence: str = "total_variation"
    policy: str = "refusal"
    over: str = "batch"
    as_coded: bool = False

    def __post_init__(self) -> None:
        divergence_form(self.divergence, self.as_coded)
        if self.over not in ("batch", "examples"):
            raise BadSetting(f"expected over to be batch or examples, found {self.over!r}; use one of them")

    def __call__(self, step: Step) -> PerExample:
        task = step.task
        other = task.relabel(step.batch, step.rng, self.policy)
        true = task.per_choice(choice_losses.probability, step.output, step.batch)
        template = task.per_choice(choice_losses.probability, answered(step, other), other)
        if self.over == "batch":
            true, template = true.mean().expand_as(true), template.mean().expand_as(template)
        return flat_loss(template, true, divergence_form(self.divergence, self.as_coded))

    def __str__(self) -> str:
        return f"flat({self.divergence}, {self.policy})"


def flat(
    divergence: str = "total_variation", policy: str = "refusal", over: str = "batch", as_coded: bool = False
) -> Objective:
    """Maximise an f-divergence between another answer and the example's own.

    policy: the task's way to draw the other answer. over: g* and f* of the mean P over the "batch", as the paper's code, or
    of each example's own P ("examples")."""
    return Pair(divergence, policy, over, as_coded)
