"""WGA: gradient ascent that lets go of a token once it has become unlikely.

Paper: Wang et al., "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", ICLR 2025,
https://arxiv.org/abs/2502.19301.

    min_theta  gamma * E_{D_f} mean_t sg(p_t)^beta log p_t + alpha * CE(D_r)

beta = 0 is gradient difference; beta = 1 has the gradient of the mean token probability, which is bounded. The step size is the
7B models' (2e-5 on Phi-1.5); a model of half a million weights wanted 3e-4.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, Gamma, finetuning, stay
from expunge.parts.objectives import weighted_ascent
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="ascent",
    paper="Wang et al., ICLR 2025, 2502.19301",
)  # fmt: skip
@finetuning(epochs=5)
def wga(
    beta: Annotated[float, setting("power of a token's probability that weights its ascent", ge=0)] = 1.0,
    gamma: Gamma = 1.0, alpha: Alpha = 1.0, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Ascent weighted by each token's probability, and the retain loss."""
    return Plan(Term(weighted_ascent(beta, average), on="forget", weight=gamma), *stay(alpha, average))
