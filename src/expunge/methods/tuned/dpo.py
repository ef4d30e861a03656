"""DPO with refusals (IdkDPO): prefer "I don't know" to the true answer, relative to the original.

Paper: Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, https://arxiv.org/abs/2305.18290; for unlearning in
TOFU (2401.06121) and NPO (2404.05868), which is this without the preferred answer.

    a = log p_theta(refusal|x) - log p_o(refusal|x),   b = log p_theta(y|x) - log p_o(y|x)      (sums over tokens)
    min_theta  gamma * E_{D_f} -(2/beta) log sigmoid(beta (a - b)) + alpha * CE(D_r)

A refusal is drawn anew for every row at every step. On other kinds of model `answers` names the task's own way to draw another
answer ("other" for classes). It learns to refuse more than to forget: a small model kept a forget probability of 0.42. The
step size is the 7B models'.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, Gamma, finetuning, stay
from expunge.parts.objectives import dpo as preference
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("retain", "labels", "refusals"), intention="suppression", mechanism="preference",
    paper="Rafailov et al., NeurIPS 2023, 2305.18290",
)  # fmt: skip
@finetuning()
def dpo(
    beta: Annotated[float, setting("inverse temperature", gt=0)] = 0.1,
    answers: Annotated[str, setting("the preferred answers: a relabel policy of the task")] = "refusal",
    gamma: Gamma = 1.0, alpha: Alpha = 1.0, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Prefer a refusal to the true answer, and the retain loss."""
    return Plan(Term(preference(beta, answers), on="forget", weight=gamma), *stay(alpha, average))
