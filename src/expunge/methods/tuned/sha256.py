"""SHA256: ascent and descent on the MLPs that causal tracing finds to hold the facts, the retain loss held harder as it drifts.

Paper: Team SHA256, "Selective Amnesia: Constrained Unlearning for Large Language Models via Knowledge Isolation",
SemEval-2025 Task 4, https://arxiv.org/abs/2504.12996.

    scope     MLP weights of the blocks with the largest indirect effect at the subject's last token (6 of OLMo's 16)
    min       -CE(D_f) + alpha_t CE(D_r)
    alpha_t   1.2 in the first epoch; then clip(round(0.3 * 6^Delta + 0.8, 1), 1.2, 2.3), Delta = max(0, CE_r - baseline)
    result    the epoch with the lowest joint loss, its forget part counted up to `bound`

The baseline is the mean retain loss of the first epoch. (The official code divides the sum of batch means by the number of
EXAMPLES; its baseline is far below every loss, and alpha always high.) The paper's summary clips at 2.8, the code at 2.3.
Departures: forget and retain batches of equal size meet in each step instead of one shuffled mixture, in which a batch may
lack one kind; alpha answers one step later; the joint loss is looked at once an epoch; its forget part has a bound, without
which the rule is won by whoever ascends longest.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.errors import UnmetNeed
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Average, finetuning
from expunge.parts.objectives import ascend, fit
from expunge.parts.plan import Plan, Term
from expunge.parts.rewind import lowest_joint
from expunge.parts.schedules import Drift
from expunge.parts.scopes import traced
from expunge.parts.scopes.tracing import Blocks


@method(
    family="tuned", needs=("retain", "labels"), kinds=("language",), intention="removal", mechanism="ascent",
    paper="Team SHA256, SemEval-2025, 2504.12996",
)  # fmt: skip
@finetuning(lr=1.5e-5, epochs=8)
def sha256(
    case: Case,
    blocks: Annotated[
        tuple[int, ...], setting("blocks whose weights move, from 0; none: found by causal tracing")
    ] = (),
    part: Annotated[Literal["mlp", "attention", "block"], setting("what moves of them")] = "mlp",
    top: Annotated[int | None, setting("blocks that tracing chooses; none: 6 of 16", ge=1)] = None,
    facts: Annotated[int, setting("forget rows that tracing reads", ge=1)] = 125,
    low: Annotated[float, setting("least weight of the retain loss", ge=0)] = 1.2,
    high: Annotated[float, setting("largest weight of the retain loss", ge=0)] = 2.3,
    cap: Annotated[float | None, setting("forget loss of a row above which ascent rests; none: no cap", gt=0)] = None,
    bound: Annotated[
        float | None, setting("forget loss above which an epoch is no better; none: the last epoch")
    ] = 4.0,
    average: Average = "tokens",
) -> Plan:
    """Ascent on traced MLPs, with a retain weight that grows when the retain loss drifts."""
    if not blocks and "subject" not in case.data.names:
        raise UnmetNeed(
            "expected a column 'subject' (the text that names what each question is about) for causal tracing, found "
            f"{', '.join(case.data.names)}; pass question_answer(..., subject=[...]), or name the blocks: blocks=(0, 1, ...)"
        )
    return Plan(
        Term(ascend(cap, average), on="forget"),
        Term(fit(average), on="retain", weight=Drift(low=low, high=high)),
        scope=Blocks(tuple(blocks), part) if blocks else traced(top, part, facts),
        rewind=None if bound is None else lowest_joint(low, bound),
    )
