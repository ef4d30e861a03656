"""Random labels: fit answers on the forget data that are not its own, and what stays as it is.

Paper: Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020, https://arxiv.org/abs/1911.04933, as a
baseline; the form here is that of SalUn's code, https://arxiv.org/abs/2310.12508, of which this is density 1.

    min_theta  E_{D_f, y' random} loss(theta; x, y') + alpha * E_{D_r} loss(theta; x, y)

`rhythm="in_turn"` passes all forget batches, then all retain batches (CIFAR-10 in that code); "mixed" shuffles both
together (CIFAR-100). Labels are drawn anew at every step, or once per run; from the wrong classes ("other") or from
all ("uniform").
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Epochs, Lr, Momentum, WeightDecay
from expunge.parts.objectives import fit, relabel
from expunge.parts.plan import Optimizer, Plan, Term


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="relabel",
    paper="Golatkar et al., CVPR 2020, 1911.04933",
)  # fmt: skip
def random_labels(
    alpha: Annotated[float, setting("weight of the retain loss", ge=0)] = 1.0,
    lr: Lr = 0.013,
    epochs: Epochs = 10,
    batch_size: BatchSize = 256,
    momentum: Momentum = 0.9,
    weight_decay: WeightDecay = 5e-4,
    policy: Annotated[
        Literal["other", "uniform"], setting("labels drawn from the wrong classes, or from all")
    ] = "other",
    draw: Annotated[Literal["step", "once"], setting("new labels at every step, or one per row and run")] = "step",
    rhythm: Annotated[
        Literal["in_turn", "mixed"], setting("forget then retain, or both shuffled together")
    ] = "in_turn",
) -> Plan:
    """Fit random labels on forget, true ones on retain."""
    return Plan(
        Term(relabel(policy, draw), on="forget"),
        Term(fit(), on="retain", weight=alpha),
        optimizer=Optimizer("sgd", lr=lr, momentum=momentum, weight_decay=weight_decay),
        epochs=epochs, batch_size=batch_size, rhythm=rhythm,
    )  # fmt: skip
