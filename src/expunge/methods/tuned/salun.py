"""SalUn: random labels on the forget data, applied only to the weights that the forget loss is most sensitive to.

Paper: "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image Classification and
Generation", Fan et al., ICLR 2024, https://arxiv.org/abs/2310.12508.

    m_S     = 1[ rank |sum_batches grad_theta mean CE(D_f)| < density * P ]      (one global ranking, eq. 3)
    theta_u = m_S (theta_o + delta) + (1 - m_S) theta_o                           (eq. 4)
    min_delta  E_{D_f, y' != y} CE(theta_u; x, y') + alpha E_{D_r} CE(theta_u; x, y)   (eq. 5)

Each epoch passes all forget batches with labels drawn anew, then all retain batches (`rhythm="in_turn"`), as the
official code does for CIFAR-10. Departure: y' is never the true label, as the paper writes; the code draws from all K
classes, which is `policy="uniform"` here. At density 1 this is random labelling (`random_labels`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.methods.registry import method, setting
from expunge.parts.objectives import fit, relabel
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import salient


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="relabel",
    paper="Fan et al., ICLR 2024, 2310.12508",
)  # fmt: skip
def salun(
    density: Annotated[float, setting("share of weights that may move", ge=0, le=1)] = 0.5,
    alpha: Annotated[float, setting("weight of the retain loss", ge=0)] = 1.0,
    lr: Annotated[float, setting("step size", gt=0)] = 0.013,
    epochs: Annotated[int, setting("passes over forget, then retain", ge=1)] = 10,
    batch_size: Annotated[int, setting("rows per step", ge=1)] = 256,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    policy: Annotated[
        Literal["other", "uniform"], setting("labels drawn from the wrong classes, or from all")
    ] = "other",
) -> Plan:
    """Random labels on the most salient weights, the rest frozen bit for bit."""
    return Plan(
        Term(relabel(policy), on="forget"),
        Term(fit(), on="retain", weight=alpha),
        scope=salient(density),
        optimizer=Optimizer("sgd", lr=lr, momentum=momentum, weight_decay=weight_decay),
        epochs=epochs, batch_size=batch_size, rhythm="in_turn",
    )  # fmt: skip
