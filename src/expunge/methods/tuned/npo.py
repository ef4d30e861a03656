"""NPO: make the forget answers less likely than the original found them, with a pull that fades as they become so.

Paper: Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning", COLM 2024,
https://arxiv.org/abs/2404.05868, eq. 3; with a retain loss beside it ("NPO+RT").

    min_theta  E_{D_f} -(2/beta) log sigmoid(-beta log(p_theta(y|x) / p_o(y|x))) + alpha * E_{D_r} loss(theta)

beta -> 0 is gradient ascent; beta > 0 weights a row's ascent by 2 p^beta / (p^beta + p_o^beta), which dies out once p
<< p_o. Written for language models, where log p is the SUM over the answer's tokens (a mean would take the brake away); any
task with a log-likelihood will do. The original enters as one number per row, so no second model is held. Defaults suit
classifiers. The paper's for a 7B model on TOFU: optimizer="adamw", lr=1e-5, weight_decay=0.01, clip=1, schedule="linear",
warmup=1, batch_size=32. On a model of half a million weights beta = 0.03 with a constant lr = 2e-4 and 20 epochs did best.
"""

from __future__ import annotations

from typing import Annotated

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
    stay,
)
from expunge.parts.objectives import npo as preference
from expunge.parts.plan import Optimizer, Plan, Term


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="preference",
    paper="Zhang et al., COLM 2024, 2404.05868",
)  # fmt: skip
def npo(
    beta: Annotated[float, setting("inverse temperature; towards 0 it is ascent", gt=0)] = 0.1,
    alpha: Annotated[float, setting("weight of the retain loss; 0 is NPO alone", ge=0)] = 1.0,
    lr: Lr = 0.01,
    epochs: Epochs = 10,
    batch_size: BatchSize = 64,
    momentum: Momentum = 0.0,
    clip: Clip = None,
    optimizer: OptimizerName = "sgd",
    weight_decay: WeightDecay = 0.0,
    schedule: Schedule = "constant",
    warmup: Warmup = 0.0,
    average: Average = "tokens",
) -> Plan:
    """Bounded ascent relative to the original, and the retain loss."""
    return Plan(
        Term(preference(beta), on="forget"), *stay(alpha, average),
        optimizer=Optimizer(
            optimizer, lr=lr, momentum=momentum if optimizer == "sgd" else 0.0, weight_decay=weight_decay, clip=clip, schedule=schedule,
            warmup=min(warmup / epochs, 1.0),
        ),
        epochs=epochs, batch_size=batch_size, rhythm="together", epoch_of="forget",
    )  # fmt: skip
