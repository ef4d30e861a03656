"""SalUn-soft: random labels, with the weights that moved least snapped back after every update.

Paper: "SalUn", Fan et al., ICLR 2024, https://arxiv.org/abs/2310.12508, the soft-thresholding variant (eq. 7 and its
algorithm).

    min_theta  E_{D_f, y' != y} loss(theta; x, y') + alpha E_{D_r} loss(theta; x, y) + beta_t ||theta - theta_o||_1

The penalty acts as a proximal step after each SGD step: theta <- theta_o + sign(d) max(|d| - tau_t, 0), d = theta -
theta_o, with tau_t the q_t-th smallest |d| and q_t = share * P * (1 - t/T): many weights are back where they were
early on, none is held at the end. Departures: the official code reads a `mask_ratio` that its parser never defines
(`share` here), and takes theta_o anew at every epoch, so that its anchor drifts; here theta_o is the original
throughout.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Epochs, Lr, Momentum, WeightDecay
from expunge.parts.objectives import fit, relabel
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.proximal import soft_threshold


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="relabel",
    paper="Fan et al., ICLR 2024, 2310.12508",
)  # fmt: skip
def salun_soft(
    share: Annotated[
        float, setting("share of weights snapped back after the first update; falls to 0", ge=0, le=1)
    ] = 0.5,
    alpha: Annotated[float, setting("weight of the retain loss", ge=0)] = 1.0,
    lr: Lr = 0.013,
    epochs: Epochs = 10,
    batch_size: BatchSize = 256,
    momentum: Momentum = 0.9,
    weight_decay: WeightDecay = 5e-4,
    policy: Annotated[
        Literal["other", "uniform"], setting("labels drawn from the wrong classes, or from all")
    ] = "other",
) -> Plan:
    """Random labels with a proximal pull to the original that fades."""
    return Plan(
        Term(relabel(policy), on="forget"),
        Term(fit(), on="retain", weight=alpha),
        proximal=soft_threshold(share),
        optimizer=Optimizer("sgd", lr=lr, momentum=momentum, weight_decay=weight_decay),
        epochs=epochs, batch_size=batch_size, rhythm="in_turn",
    )  # fmt: skip
