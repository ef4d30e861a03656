"""Boundary unlearning: move the decision boundary over what goes, with the forget data alone.

Paper: Chen et al., "Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision Boundary", CVPR
2023, https://arxiv.org/abs/2303.11570, eqs. 5-7 (shrink) and 8 (expand).

    shrink   x' = clip(x + b sign(grad_x loss(f_o(x), y)));  y' = argmax f_o(x');  min_theta loss(f(x), y')  over D_f
    expand   f gets a (K+1)-th output;  min_theta loss(f(x), K+1)  over D_f;  the output is deleted

Departures. Shrink: one FGSM step often fails to cross the boundary (hit rates of 35-53 % on digits), and the official
code then relearns the true class; here such rows are attacked again with a growing radius, and dropped if they still
miss (`misses`). The neighbours are found once, on the original model. Expand: the extra output really is deleted,
which one port forgets.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Epochs, Lr, Momentum
from expunge.parts.objectives import last_output, nearest_class
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import expanded

PAPER = "Chen et al., CVPR 2023, 2303.11570"


@method(
    family="tuned",
    needs=("labels",),
    kinds=("classification",),
    intention="removal",
    mechanism="relabel",
    paper=PAPER,
)
def boundary_shrink(
    radius: Annotated[float, setting("L-infinity size of the attack, in the inputs' own unit", gt=0)] = 0.1,
    attack_steps: Annotated[int, setting("1 is FGSM, more is PGD", ge=1)] = 1,
    low: Annotated[float | None, setting("least value of an input; none: no limit")] = 0.0,
    high: Annotated[float | None, setting("largest value of an input; none: no limit")] = 1.0,
    misses: Annotated[
        Literal["again", "drop", "keep"], setting("rows whose attack fails: harder attack, leave out, relearn")
    ] = "again",
    lr: Lr = 1e-5,
    epochs: Epochs = 10,
    batch_size: BatchSize = 64,
    momentum: Momentum = 0.9,
) -> Plan:
    """Fit each forget row to the class across its nearest decision boundary."""
    return Plan(
        Term(nearest_class(radius, attack_steps, misses, low=low, high=high), on="forget"),
        optimizer=Optimizer("sgd", lr=lr, momentum=momentum), epochs=epochs, batch_size=batch_size,
    )  # fmt: skip


@method(
    family="tuned",
    needs=("labels",),
    kinds=("classification",),
    intention="removal",
    mechanism="relabel",
    paper=PAPER,
)
def boundary_expand(lr: Lr = 1e-5, epochs: Epochs = 10, batch_size: BatchSize = 64, momentum: Momentum = 0.9) -> Plan:
    """Fit the forget rows to a class that exists only while training."""
    return Plan(
        Term(last_output(), on="forget"), scope=expanded(),
        optimizer=Optimizer("sgd", lr=lr, momentum=momentum), epochs=epochs, batch_size=batch_size,
    )  # fmt: skip
