"""NegGrad+: descend on what stays and ascend on what goes, in one weighted step.

Paper: Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023, https://arxiv.org/abs/2302.09880, eq. 5.

    min_theta  a * mean loss(retain batch) - (1 - a) * mean loss(forget batch)

An epoch is one pass over the retain data; forget batches go round, reshuffled on every lap (the official `cycle`
repeats its first shuffling for ever). a = 0.95 for small sets, up to 0.9999 for large ones. "Advanced NegGrad" of
MUFAC is a = 0.5 at twice the step size. Departure: `cap` bounds the ascent; off by default.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Clip, Epochs, Lr, Momentum, WeightDecay
from expunge.parts.objectives import ascend, fit
from expunge.parts.plan import Optimizer, Plan, Term


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="ascent",
    paper="Kurmanji et al., NeurIPS 2023, 2302.09880",
)  # fmt: skip
def neggrad_plus(
    alpha: Annotated[float, setting("weight of the retain loss; the forget loss has 1 - alpha", ge=0, le=1)] = 0.95,
    lr: Lr = 0.01,
    epochs: Epochs = 10,
    batch_size: BatchSize = 64,
    momentum: Momentum = 0.9,
    weight_decay: WeightDecay = 0.0,
    cap: Annotated[float | None, setting("forget loss in nats beyond which a row pulls no more", gt=0)] = None,
    clip: Clip = None,
) -> Plan:
    """Descend on retain while ascending on forget."""
    return Plan(
        Term(ascend(cap), on="forget", weight=1 - alpha),
        Term(fit(), on="retain", weight=alpha),
        optimizer=Optimizer("sgd", lr=lr, momentum=momentum, weight_decay=weight_decay, clip=clip),
        epochs=epochs, batch_size=batch_size, rhythm="together", epoch_of="retain",
    )  # fmt: skip
