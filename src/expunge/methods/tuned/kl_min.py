"""KL minimisation: climb the loss of what goes, and say about what stays what the original said.

Paper: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", COLM 2024, https://arxiv.org/abs/2401.06121.

    min_theta  -gamma * CE(D_f) + alpha * E_{D_r} KL(p_original || p_theta)

The direction is KL(original || model). Departure: the divergence is taken where answers are predicted, mean per example; the
official codes average over prompt and padding too, which dilutes it by the share of padding. The step size is the 7B models'.
"""

from __future__ import annotations

from expunge.methods.registry import method
from expunge.methods.tuned.common import Alpha, Average, Gamma, finetuning, stay
from expunge.parts.objectives import ascend
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="ascent",
    paper="Maini et al., COLM 2024, 2401.06121",
)  # fmt: skip
@finetuning()
def kl_min(
    gamma: Gamma = 1.0, alpha: Alpha = 1.0, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Ascent on forget, held by the original's predictions on retain."""
    return Plan(Term(ascend(average=average), on="forget", weight=gamma), *stay(alpha, by="kl"))
