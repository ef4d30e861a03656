"""LoKU: a bounded forget loss, on low-rank adapters that begin in what matters to the forget rows alone.

Paper: Cha et al., "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", ICLR 2025,
https://arxiv.org/abs/2408.06621.

    IHL    1 + p(y_t) - max_{v != y_t} p(v)  per answer token, in 0..2: lowers y, raises its runner-up only
    FILA   A, B = argmin || diag(r) (W - s B A) ||_F,  r_i^2 = sum_j F_forget,ij / (F_retain,ij + 1e-5);  W <- W - s B A
    min_{A, B}  E_{D_f} IHL + alpha CE(D_r),   and s B A is merged at the end

Ascent's gradient keeps 1 - p on the answer and raises the whole rest of the vocabulary; IHL's dies out with p. Departures:
F_retain is measured on as many retain rows as there are forget rows (the paper's paired epoch), the split of W is exact on
matrices of up to 1024 rows or columns, and what comes out is the merged model (the official script saves base and adapter
apart, which is another model when the adapter meets the original base). The output layer has no adapter.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, finetuning, stay
from expunge.parts.objectives import inverted_hinge
from expunge.parts.plan import Plan, Term
from expunge.parts.scopes import fisher_low_rank


@method(
    family="tuned", needs=("retain", "labels"), kinds=("classification", "language"), intention="removal",
    mechanism="ascent", paper="Cha et al., ICLR 2025, 2408.06621",
)  # fmt: skip
@finetuning(lr=1e-4, epochs=5)
def loku(
    rank: Annotated[int, setting("of the adapters", ge=1)] = 32,
    scaling: Annotated[float, setting("s: adapters count s times (LoRA's alpha / rank)", gt=0)] = 2.0,
    alpha: Alpha = 1.0,
    targets: Annotated[tuple[str, ...], setting("names of layers with adapters; none: all linear but the output")] = (),
    fisher_batch_size: Annotated[int, setting("rows per gradient of the information; 1: per example", ge=1)] = 2,
    fisher_retain_rows: Annotated[int | None, setting("retain rows it reads; none: as many as forget", ge=1)] = None,
    average: Average = "tokens",
) -> Plan:
    """Inverted hinge on forget and the retain loss, on Fisher-weighted low-rank adapters."""
    return Plan(
        Term(inverted_hinge(average), on="forget"), *stay(alpha, average),
        scope=fisher_low_rank(rank, scaling * rank, targets, fisher_batch_size, fisher_retain_rows),
    )  # fmt: skip
