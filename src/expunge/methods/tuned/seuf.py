"""SEUF (UOE): find the expert that the forget rows use most, and unlearn on that expert and its router alone.

Paper: Zhuang et al., "SEUF: Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?", ACL 2025,
https://arxiv.org/abs/2411.18797.

    a_i^l  = (1/N) sum_j (1/L_j) sum_t g_{i,t}^l       g: router probability, 0 outside the top k; forget rows j, tokens t
    l*, i* = argmax a                                   (the `top` highest)
    min over experts i* of layer l* and its router   L_unlearn + anchor * mean_{t, i} (s_{i,t} - 1[i = i*])^2

With ordinary unlearning the router sends the forget tokens to other experts and the damage spreads; the anchor holds them.
s is the softmax over all experts: the top-k gates would leave the others without a gradient. The inner loss is any: ascent,
ascent with a retain loss, or NPO against a frozen copy (the repository's NPO takes the current model as its reference, and
so is ascent). The released code hard-codes the expert; here it is found. A dense model is refused. Load-balancing losses
play no part: only the task's own loss is read. Ascent on one expert diverges after some tens of steps, hence `cap`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, finetuning, stay
from expunge.parts.mixture import affinities, most_used
from expunge.parts.objectives import ascend, npo
from expunge.parts.objectives.routing import router_anchor
from expunge.parts.plan import Plan, Term
from expunge.parts.scopes import experts
from expunge.seeds import generator


@method(
    family="tuned", needs=("labels", "mixture"), intention="removal", mechanism="ascent",
    paper="Zhuang et al., ACL 2025, 2411.18797",
)  # fmt: skip
@finetuning(lr=2e-4, schedule="constant", warmup=0.0)
def seuf(
    case: Case,
    inner: Annotated[Literal["ascent", "npo"], setting("the forget loss")] = "ascent",
    anchor: Annotated[float, setting("weight of holding the router on the chosen experts", ge=0)] = 1.0,
    alpha: Alpha = 0.0,
    top: Annotated[int, setting("experts that may move, the most used ones", ge=1)] = 1,
    chosen: Annotated[tuple[tuple[str, int], ...], setting("experts as (layer, number) instead of the most used")] = (),
    rows: Annotated[int, setting("forget rows that the attribution reads", ge=1)] = 256,
    cap: Annotated[float | None, setting("forget loss of a row above which ascent rests; none: no cap", gt=0)] = None,
    beta: Annotated[float, setting("inverse temperature of npo", gt=0)] = 0.1,
    average: Average = "tokens",
) -> Plan:
    """Unlearn on the most used expert alone, with its router held in place."""
    forget = case.split("forget")
    if not chosen and len(forget):
        sample = forget.sample(rows, generator(case.seed, "seuf"))
        chosen = most_used(affinities(case.task, case.model, sample.batches(32)), top)
    loss = ascend(cap, average) if inner == "ascent" else npo(beta)
    return Plan(
        Term(loss, on="forget"), *([Term(router_anchor(chosen), on="forget", weight=anchor)] if anchor else []),
        *stay(alpha, average), scope=experts(top, chosen, rows),
    )  # fmt: skip
