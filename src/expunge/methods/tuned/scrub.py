"""SCRUB: disobey the teacher on what goes, obey it on what stays, by turns.

Paper: Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023, https://arxiv.org/abs/2302.09880, eq. 3
and alg. 1.

    epochs 1..msteps:  one pass over D_f,  max  T^2 KL_T(p_original || p_theta)
    every epoch:       one pass over D_r,  min  gamma * loss(theta) + alpha * T^2 KL_T(p_original || p_theta)

The forget pass has no cross-entropy. Defaults are the official large-scale settings; the small-scale ones are in the
card. `rewind=True` is SCRUB+R: the epoch whose forget accuracy is nearest to the final model's on holdout comes out,
so that the forget rows do not stand out by being known too badly. Departures: the official small-scale script trains
in eval mode (batch norm frozen), here training mode is used throughout; `rewind` compares the task's utility,
whatever the task.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Epochs, Lr, Momentum, WeightDecay
from expunge.parts.objectives import fit, leave, match
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.rewind import rewind as rewinding
from expunge.parts.schedules import Until


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="distillation",
    paper="Kurmanji et al., NeurIPS 2023, 2302.09880",
)  # fmt: skip
def scrub(
    lr: Lr = 5e-4,
    epochs: Epochs = 3,
    msteps: Annotated[int, setting("epochs that begin with a forget pass", ge=0)] = 2,
    gamma: Annotated[float, setting("weight of the retain loss", ge=0)] = 0.99,
    alpha: Annotated[float, setting("weight of staying near the original on retain", ge=0)] = 0.001,
    temperature: Annotated[float, setting("divides the logits in both divergences", gt=0)] = 4.0,
    forget_batch_size: BatchSize = 32,
    retain_batch_size: BatchSize = 128,
    optimizer: Annotated[Literal["sgd", "adam"], setting("how weights move")] = "sgd",
    momentum: Momentum = 0.9,
    weight_decay: WeightDecay = 5e-4,
    milestones: Annotated[tuple[int, ...], setting("epochs after which lr is multiplied by 0.1")] = (3, 5, 9),
    rewind: Annotated[bool, setting("SCRUB+R: return the epoch whose forget utility is nearest to holdout's")] = False,
) -> Plan:
    """Max passes on forget, min passes on retain, against the original as teacher."""
    return Plan(
        Term(leave("original", temperature), on="forget", weight=Until(msteps), batch_size=forget_batch_size),
        Term(fit(), on="retain", weight=gamma, batch_size=retain_batch_size),
        Term(match("original", temperature), on="retain", weight=alpha),
        optimizer=Optimizer(
            optimizer, lr=lr, momentum=momentum if optimizer == "sgd" else 0.0, weight_decay=weight_decay,
            schedule="steps", milestones=milestones,
        ),
        epochs=epochs, rhythm="in_turn", rewind=rewinding() if rewind else None,
    )  # fmt: skip
