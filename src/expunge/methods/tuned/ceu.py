"""CE-U: towards what the model itself would say if the true answer did not exist.

Paper: Yang, "CE-U: Cross Entropy Unlearning", https://arxiv.org/abs/2503.01224.

    min_theta  E_{D_f} CE( sg softmax(z with z_y = -inf) || p_theta )

Its gradient is that of the unlikelihood loss -log(1 - p), ascent weighted by p / (1 - p): at rest where the answer is forgotten,
steep where the model is sure. There is no retain term. The first `skip` answer tokens do not count (the paper's footnote), but
an example's last one always does, so that a classifier's single choice is trained. Departure: `alpha` adds a retain loss; off.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, finetuning, stay
from expunge.parts.objectives import ceu as without_answer
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("labels",), intention="removal", mechanism="ascent", paper="Yang, 2025, 2503.01224",
)  # fmt: skip
@finetuning()
def ceu(
    skip: Annotated[int, setting("first answer tokens that do not count", ge=0)] = 1,
    alpha: Alpha = 0.0, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Match the model's own choice among the rest."""
    return Plan(Term(without_answer(skip, average), on="forget"), *stay(alpha, average))
