"""Gradient ascent: raise the loss on the forget data, and stop before everything else goes with it.

Baseline of nearly every paper (Thudi et al., "Unrolling SGD", https://arxiv.org/abs/2109.13398; Graves et al., 2021).

    theta <- theta + lr * grad mean loss(D_f)

The loss has no upper bound, so the plain rule ends in collapse. Departure: three ways to bound it, all off by
default: `cap` (nats beyond which a row pulls no more), `clip` (gradient norm), `stop="holdout"` (end when the forget
rows are known no better than unseen ones). Defaults are those of the SalUn and Unlearn-Sparse code: 5 epochs at 1e-4.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Clip, Epochs, Lr, Momentum
from expunge.parts.objectives import ascend
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.stops import forget_reaches_holdout


@method(
    family="tuned", needs=("labels",), intention="suppression", mechanism="ascent", paper="Thudi et al., 2109.13398"
)
def grad_ascent(
    lr: Lr = 1e-4,
    epochs: Epochs = 5,
    batch_size: BatchSize = 256,
    momentum: Momentum = 0.9,
    cap: Annotated[
        float | None, setting("loss in nats beyond which a row pulls no more; none: unbounded", gt=0)
    ] = None,
    clip: Clip = None,
    stop: Annotated[Literal["never", "holdout"], setting("end early when the forget loss reaches holdout's")] = "never",
) -> Plan:
    """Climb the loss of the forget data."""
    return Plan(
        Term(ascend(cap), on="forget"),
        optimizer=Optimizer("sgd", lr=lr, momentum=momentum, clip=clip), epochs=epochs, batch_size=batch_size,
        stop=forget_reaches_holdout() if stop == "holdout" else None,
    )  # fmt: skip
