"""Who's Harry Potter, as a guard: push down what a model that knows the forget rows even better would rather say.

Paper: Eldan and Russinovich, "Who's Harry Potter? Approximate Unlearning in LLMs", 2023, https://arxiv.org/abs/2310.02238,
eq. 1; in the form that MUSE (2407.06460) measures as WHP.

    z = z_f - alpha relu(z_r - z_f)        r: the model fine-tuned further on D_f

The paper trains on the likeliest token of z as a label; here z is used at inference, the weights of f stay. Both networks are
needed to serve, and r, which is saved, knows the forget rows better than f: this suppresses, it never removes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from torch import nn

from expunge.methods.edited.task_vector import reinforced, reinforcing
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Clip, Epochs, Lr, OptimizerName
from expunge.parts.combined import CombinedLogits, Excess
from expunge.parts.plan import Guard

if TYPE_CHECKING:
    from expunge.engine.workbench import Workbench


@method(
    family="guarded", needs=("labels",), kinds=("classification", "language"), intention="suppression",
    mechanism="logit difference", paper="Eldan and Russinovich, 2023, 2310.02238",
)  # fmt: skip
def whp(
    alpha: Annotated[float, setting("how far a token's excess logit is pushed below the base's", ge=0)] = 1.0,
    lr: Lr = 1e-5,
    epochs: Epochs = 10,
    batch_size: BatchSize = 32,
    optimizer: OptimizerName = "adamw",
    clip: Clip = 1.0,
) -> Guard:
    """Subtract what a reinforced copy of the model adds to each logit."""
    rule, plan = Excess(alpha), reinforcing(lr, epochs, batch_size, optimizer, clip)

    def wrap(bench: Workbench) -> nn.Module:
        return CombinedLogits(bench.model, reinforced(bench, plan), rule)

    return Guard(wrap, f"{rule}, {plan}")
