"""UNDIAL: distil from the original with the true answer's logit lowered, which is a fixed and therefore stable target.

Paper: Dong et al., "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models", NAACL 2025,
https://arxiv.org/abs/2402.10052.

    min_theta  gamma * E_{D_f} CE( softmax(z_o - beta onehot(y)) || p_theta ) + alpha * CE(D_r)

The paper uses no retain data (alpha = 0) and LoRA of rank 8; beta 3 to 30. Departure: the mean is over answer tokens; the
framework's runs over prompt and padding, where it lowers the logit of a token that is none (index -100 from the end).
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, Gamma, finetuning, stay
from expunge.parts.objectives import undial as distil
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("labels",), intention="removal", mechanism="distillation",
    paper="Dong et al., NAACL 2025, 2402.10052",
)  # fmt: skip
@finetuning(lr=1e-4)
def undial(
    beta: Annotated[float, setting("by how much the answer's logit is lowered", ge=0)] = 10.0,
    gamma: Gamma = 1.0, alpha: Alpha = 0.0, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Match the original with the answer's logit lowered."""
    return Plan(Term(distil(beta, average=average), on="forget", weight=gamma), *stay(alpha, average))
