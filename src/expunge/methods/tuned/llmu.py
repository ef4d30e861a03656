"""LLMU: climb on what goes, learn unrelated answers to its questions, and stay near the original elsewhere.

Paper: Yao et al., "Large Language Model Unlearning", NeurIPS 2024, https://arxiv.org/abs/2310.10683.

    min_theta  -bad * CE(D_f) + random * E_{x in D_f} CE(y'|x) + normal * E_{D_r} KL(p_original || p_theta)

Weights are those of FLAT's code (0.5, 1, 1), where it is a baseline. y' is drawn anew for every row at every step. The paper
draws it from another dataset's answers; here `answers` is a relabel policy of the task, refusals by default ("other" would
teach other forget rows' answers). Departure: the divergence is taken where answers are predicted, not on padding.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Average, finetuning
from expunge.parts.objectives import ascend, match, relabel
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("retain", "labels", "refusals"), intention="removal", mechanism="ascent",
    paper="Yao et al., NeurIPS 2024, 2310.10683",
)  # fmt: skip
@finetuning()
def llmu(
    bad: Annotated[float, setting("weight of the ascent", ge=0)] = 0.5,
    random: Annotated[float, setting("weight of the unrelated answers", ge=0)] = 1.0,
    normal: Annotated[float, setting("weight of staying near the original on retain", ge=0)] = 1.0,
    answers: Annotated[str, setting("the unrelated answers: a relabel policy of the task")] = "refusal",
    average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Ascent, unrelated answers, and the original's predictions on retain."""
    return Plan(
        Term(ascend(average=average), on="forget", weight=bad),
        Term(relabel(answers, average=average), on="forget", weight=random),
        Term(match("original"), on="retain", weight=normal),
    )  # fmt: skip
