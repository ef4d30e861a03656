"""Gradient difference: climb the loss of what goes and descend on what stays, in one step.

Paper: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", COLM 2024, https://arxiv.org/abs/2401.06121 (after Liu
et al., 2203.12817).

    min_theta  -gamma * CE(D_f) + alpha * CE(D_r)

CE is the mean over a batch's answer tokens, as in transformers (`average`). The ascent is unbounded, and clipping is all that
holds it: compare methods by where forget and retain stand together, never by how forgotten the forget rows are. Departure:
`cap` (nats beyond which a row pulls no more), off by default. The step size is the 7B models'; a model of half a million
weights wanted 3e-4.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, Gamma, finetuning, stay
from expunge.parts.objectives import ascend
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="ascent",
    paper="Maini et al., COLM 2024, 2401.06121",
)  # fmt: skip
@finetuning()
def grad_diff(
    gamma: Gamma = 1.0, alpha: Alpha = 1.0,
    cap: Annotated[float | None, setting("loss in nats beyond which a row pulls no more; none: unbounded", gt=0)] = None,
    average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Ascent on forget beside the retain loss."""
    return Plan(Term(ascend(cap, average), on="forget", weight=gamma), *stay(alpha, average))
