"""FLAT: away from the true answer and towards a template answer, by an f-divergence of two probabilities.

Paper: Wang et al., "LLM Unlearning via Loss Adjustment with Only Forget Data", ICLR 2025, https://arxiv.org/abs/2410.11143.

    min_theta  -g*( P(x_f, y_e) ) + f*( g*( P(x_f, y_f) ) ),   P(x, y) = mean_t p_theta(y_t | x, y_<t), mean over the batch

Neither retain data nor a frozen model. y_e is a refusal, drawn anew for every row at every step; where P(y_e) is near 0, so is
its gradient: the model must have seen refusals. Departures: P is the mean over an answer's own tokens (the code's runs over all
padded positions, so that its step sizes do not carry over); three of the eight published forms run backwards and are refused
unless `as_coded` (see `parts/objectives/pairs.py`); `alpha` adds a retain loss, off. On other kinds of model `answers` names the
task's own way to draw another answer.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, finetuning, stay
from expunge.parts.objectives import flat as pair
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("labels", "refusals"), intention="removal", mechanism="preference",
    paper="Wang et al., ICLR 2025, 2410.11143",
)  # fmt: skip
@finetuning(epochs=5)
def flat(
    divergence: Annotated[
        Literal["total_variation", "kl", "jensen_shannon", "pearson", "jeffrey", "squared_hellinger", "reverse_kl", "neyman"],
        setting("of the two answers; the last three only as_coded"),
    ] = "total_variation",
    answers: Annotated[str, setting("the template answers: a relabel policy of the task")] = "refusal",
    as_coded: Annotated[bool, setting("allow the three forms that the official code has backwards")] = False,
    alpha: Alpha = 0.0,
) -> Plan:  # fmt: skip
    """Raise a template answer and lower the true one by an f-divergence."""
    return Plan(Term(pair(divergence, answers, as_coded=as_coded), on="forget"), *stay(alpha))
