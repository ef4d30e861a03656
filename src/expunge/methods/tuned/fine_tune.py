"""Fine-tuning on what stays, and its two variants on the last layers.

    FT      min_theta E_{D_r} loss(theta)
    CF-k    the same, only the last k layers move
    EU-k    the same, and those layers are drawn anew first

FT hopes that the rest drifts away; it is the baseline that forgets least. EU-k is exact for the last k layers given
the frozen ones, and nothing else: the layers below still carry the forget data (Goel et al., "Towards Adversarial
Evaluations for Inexact Machine Unlearning", https://arxiv.org/abs/2201.06640). A layer is a module that owns
parameters, counted from the output.
"""

from __future__ import annotations

from typing import Annotated, Any

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Epochs, Lr, Momentum
from expunge.parts.objectives import fit
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import last_layers, redrawn

Last = Annotated[int, setting("how many of the last layers may move", ge=1)]


def _retrain_on_retain(epochs: int, lr: float, momentum: float, batch_size: int, **more: Any) -> Plan:
    return Plan(
        Term(fit(), on="retain"), optimizer=Optimizer("sgd", lr=lr, momentum=momentum),
        epochs=epochs, batch_size=batch_size, **more,
    )  # fmt: skip


@method(family="tuned", needs=("retain", "labels"), intention="baseline", mechanism="drift", paper="baseline")
def fine_tune(lr: Lr = 0.01, epochs: Epochs = 10, momentum: Momentum = 0.9, batch_size: BatchSize = 64) -> Plan:
    """Continue training on the retain data."""
    return _retrain_on_retain(epochs, lr, momentum, batch_size)


@method(
    family="tuned", needs=("retain", "labels"), intention="baseline", mechanism="drift", paper="Goel et al., 2201.06640"
)
def cf_k(k: Last = 1, lr: Lr = 0.01, epochs: Epochs = 10, momentum: Momentum = 0.9, batch_size: BatchSize = 64) -> Plan:
    """Catastrophic forgetting-k: fine-tune only the last k layers."""
    return _retrain_on_retain(epochs, lr, momentum, batch_size, scope=last_layers(k))


@method(
    family="tuned",
    needs=("retain", "labels"),
    intention="baseline",
    mechanism="retrain layers",
    paper="Goel et al., 2201.06640",
)
def eu_k(k: Last = 1, lr: Lr = 0.05, epochs: Epochs = 10, momentum: Momentum = 0.9, batch_size: BatchSize = 64) -> Plan:
    """Exact unlearning of the last k layers: draw them anew, then train only them on the retain data."""
    return _retrain_on_retain(epochs, lr, momentum, batch_size, scope=redrawn(last_layers(k)))
