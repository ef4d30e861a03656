"""Gradient ascent: raise the loss on the forget data, and stop before everything else goes with it.

Baseline of nearly every paper (Thudi et al., "Unrolling SGD", https://arxiv.org/abs/2109.13398; Graves et al., 2021).

    theta <- theta + lr * grad mean loss(D_f)

The loss has no upper bound, so the plain rule ends in collapse. Departure: three ways to bound it, all off by
default: `cap` (nats beyond which a row pulls no more), `clip` (gradient norm), `until="holdout"` (end when the forget
rows are known no better than unseen ones). Defaults are those of the SalUn and Unlearn-Sparse code: 5 epochs at 1e-4.
On language models the framework's are optimizer="adamw", lr=1e-5, 10 epochs, batch_size=32, clip=1, warmup=1,
schedule="linear", and the mean over tokens (`average`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import (
    Average,
    BatchSize,
    Clip,
    Epochs,
    Lr,
    Momentum,
    OptimizerName,
    Schedule,
    Warmup,
    WeightDecay,
)
from expunge.parts.objectives import ascend
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.stops import forget_reaches_holdout


@method(family="tuned", needs=("labels",), intention="removal", mechanism="ascent", paper="Thudi et al., 2109.13398")
def grad_ascent(
    lr: Lr = 1e-4,
    epochs: Epochs = 5,
    batch_size: BatchSize = 256,
    momentum: Momentum = 0.9,
    cap: Annotated[
        float | None, setting("loss in nats beyond which a row pulls no more; none: unbounded", gt=0)
    ] = None,
    clip: Clip = None,
    until: Annotated[
        Literal["never", "holdout"], setting("end early when the forget loss reaches holdout's")
    ] = "never",
    optimizer: OptimizerName = "sgd",
    weight_decay: WeightDecay = 0.0,
    schedule: Schedule = "constant",
    warmup: Warmup = 0.0,
    average: Average = "tokens",
) -> Plan:
    """Climb the loss of the forget data."""
    return Plan(
        Term(ascend(cap, average), on="forget"),
        optimizer=Optimizer(
            optimizer, lr=lr, momentum=momentum if optimizer == "sgd" else 0.0, weight_decay=weight_decay, clip=clip,
            schedule=schedule, warmup=min(warmup / epochs, 1.0),
        ),
        epochs=epochs, batch_size=batch_size,
        stop=forget_reaches_holdout() if until == "holdout" else None,
    )  # fmt: skip
