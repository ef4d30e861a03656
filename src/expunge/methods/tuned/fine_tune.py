"""Fine-tuning on what stays, and its two variants on the last layers.

FT trains on the retain data and hopes that the rest drifts away; it is the baseline that forgets least. CF-k moves only the
last k layers. EU-k re-initialises those layers first, which is exact for them and nothing else (Goel et al., 2201.06640).
"""

from __future__ import annotations

from typing import Annotated, Any

from expunge.methods.registry import method, setting
from expunge.parts.objectives import fit
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import last_layers

Lr = Annotated[float, setting("step size", gt=0)]
Epochs = Annotated[int, setting("passes over the retain data", ge=1)]
BatchSize = Annotated[int, setting("rows per step", ge=1)]
Last = Annotated[int, setting("how many of the last layers may move", ge=1)]


def _retrain_on_retain(epochs: int, lr: float, momentum: float, batch_size: int, **more: Any) -> Plan:
    return Plan(
        Term(fit(), on="retain"), optimizer=Optimizer("sgd", lr=lr, momentum=momentum), epochs=epochs, batch_size=batch_size,
        **more,
    )  # fmt: skip


@method(family="tuned", needs=("retain", "labels"), intention="baseline", mechanism="drift", paper="baseline")
def fine_tune(lr: Lr = 0.01, epochs: Epochs = 10, momentum: float = 0.9, batch_size: BatchSize = 64) -> Plan:
    """Continue training on the retain data."""
    return _retrain_on_retain(epochs, lr, momentum, batch_size)


@method(family="tuned", needs=("retain", "labels"), intention="baseline", mechanism="drift", paper="Goel et al., 2201.06640")
def cf_k(k: Last = 1, lr: Lr = 0.01, epochs: Epochs = 10, momentum: float = 0.9, batch_size: BatchSize = 64) -> Plan:
    """Catastrophic forgetting-k: fine-tune only the last k layers."""
    return _retrain_on_retain(epochs, lr, momentum, batch_size, scope=last_layers(k))
