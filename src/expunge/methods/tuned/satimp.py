"""SatImp: ascent weighted by how saturated (p high) and how important (1 - p) a token is.

Paper: Yang et al., "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", ICML 2025,
https://arxiv.org/abs/2505.11953.

    min_theta  gamma * E_{D_f} mean_t sg( p_t^beta1 (1 - p_t)^beta2 ) log p_t + alpha * CE(D_r)

Defaults are the paper's (gamma 1, alpha 0.1); the framework's configuration has them the other way round (gamma 0.1, alpha 1).
With beta1 = 5 tokens below p = 0.5 hardly count, so that it stops early. The step size is the 7B models'; a model of half a
million weights wanted 3e-4.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, Gamma, finetuning, stay
from expunge.parts.objectives import satimp as reweighted
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="ascent",
    paper="Yang et al., ICML 2025, 2505.11953",
)  # fmt: skip
@finetuning(epochs=5)
def satimp(
    beta1: Annotated[float, setting("power of p, saturation", ge=0)] = 5.0,
    beta2: Annotated[float, setting("power of 1 - p, importance", ge=0)] = 1.0,
    gamma: Gamma = 1.0, alpha: Alpha = 0.1, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Ascent weighted by saturation and importance, and the retain loss."""
    return Plan(Term(reweighted(beta1, beta2, average), on="forget", weight=gamma), *stay(alpha, average))
