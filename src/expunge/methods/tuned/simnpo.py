"""SimNPO: NPO without a frozen model, with a brake on the loss per token.

Paper: Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
https://arxiv.org/abs/2410.07163.

    min_theta  gamma * E_{D_f} -(2/beta) log sigmoid(beta (S/n - delta)) + alpha * CE(D_r),   S/n = -log p(y|x) / n tokens

NPO compares the whole answer's likelihood with the original's, so that long answers are braked at once and every answer is
pulled alike in the first epoch; here a row's pull is (2/n) sigmoid(-beta (S/n - delta)). `delta` is inside and multiplied by
beta, as in every released code; the paper's own gamma is beta * delta. Defaults are the paper's for TOFU forget10 on 7B:
gamma 0.125. On a model of half a million weights gamma = 1 was needed.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, Gamma, finetuning, stay
from expunge.parts.objectives import simnpo as preference
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="preference",
    paper="Fan et al., 2025, 2410.07163",
)  # fmt: skip
@finetuning()
def simnpo(
    beta: Annotated[float, setting("inverse temperature, per nat per token; towards 0 it is ascent", gt=0)] = 4.5,
    delta: Annotated[float, setting("nats per token at which the pull is half", ge=0)] = 0.0,
    gamma: Gamma = 0.125, alpha: Alpha = 1.0, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Length-normalised, reference-free bounded ascent, and the retain loss."""
    return Plan(Term(preference(beta, delta), on="forget", weight=gamma), *stay(alpha, average))
