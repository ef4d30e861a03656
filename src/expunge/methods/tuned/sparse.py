"""Sparsity makes forgetting easier: an L1 penalty while fine-tuning, or pruning before it.

Paper: Liu et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, https://arxiv.org/abs/2304.04934,
eqs. 3 and 4.

    l1_sparse     min_theta  E_{D_r} loss(theta) + gamma_e ||theta||_1,   gamma_e = gamma (1 - e / (E - rest)), then 0
    prune_first   theta <- m * theta, m = the largest 1 - rate of the (hidden) weights;  train under m;
                  then min_theta E_{D_r} loss(m * theta)

The penalty is over all parameters, by its sub-gradient at every step, read against the mean loss; nothing is pruned
at the end. Departures of prune_first: a model that is already trained has no early checkpoint to rewind to, so the
sparse training starts from the pruned weights themselves; it reads the whole training set, as the paper does (pruning
comes before the request), unless `sparse_on="retain"`. Without convolutions all matrices but the last are pruned. The
official parser's default alpha = 0.2 belongs to other methods and destroys a model here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Epochs, Lr, Momentum, WeightDecay
from expunge.parts.objectives import fit, l1
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.schedules import Constant, Decay, Rise
from expunge.parts.scopes import pruned, unpruned

PAPER = "Liu et al., NeurIPS 2023, 2304.04934"


@method(family="tuned", needs=("retain", "labels"), intention="removal", mechanism="drift", paper=PAPER)
def l1_sparse(
    gamma: Annotated[float, setting("weight of the L1 norm against the mean loss, at the start", ge=0)] = 5e-4,
    rest: Annotated[int, setting("last epochs without the penalty", ge=0)] = 0,
    schedule: Annotated[
        Literal["falling", "constant", "rising"], setting("of the penalty over the epochs")
    ] = "falling",
    lr: Lr = 0.01,
    epochs: Epochs = 10,
    batch_size: BatchSize = 256,
    momentum: Momentum = 0.9,
    weight_decay: WeightDecay = 5e-4,
) -> Plan:
    """Fine-tune on retain with an L1 penalty that fades."""
    weight = {"falling": Decay(gamma, rest), "constant": Constant(gamma), "rising": Rise(gamma)}[schedule]
    return Plan(
        Term(fit(), on="retain"),
        Term(l1(), on="retain", weight=weight),
        optimizer=Optimizer("sgd", lr=lr, momentum=momentum, weight_decay=weight_decay),
        epochs=epochs, batch_size=batch_size,
    )  # fmt: skip


@method(family="tuned", needs=("retain", "labels", "recipe"), intention="removal", mechanism="drift", paper=PAPER)
def prune_first(
    case: Case,
    rate: Annotated[float, setting("share of the prunable weights that go", ge=0, lt=1)] = 0.95,
    score: Annotated[Literal["magnitude", "synflow"], setting("which weights matter")] = "magnitude",
    layers: Annotated[
        tuple[str, ...], setting("names (patterns) of prunable weights; none: kernels, or hidden matrices")
    ] = (),
    sparse_epochs: Annotated[int | None, setting("epochs of training under the mask; none: the recipe's", ge=1)] = None,
    sparse_on: Annotated[Literal["train", "retain"], setting("what the sparse training reads")] = "train",
    lr: Lr = 0.01,
    epochs: Epochs = 10,
    batch_size: BatchSize = 256,
    momentum: Momentum = 0.9,
    weight_decay: WeightDecay = 5e-4,
) -> Plan:
    """Prune, train under the mask by the case's recipe, then fine-tune on retain; pruned weights stay exactly zero."""
    assert case.recipe is not None  # declared as a need
    return Plan(phases=(
        case.recipe.plan(
            on=sparse_on, scope=pruned(rate, score, layers), epochs=sparse_epochs or case.recipe.epochs,
            name="sparse training",
        ),
        Plan(
            Term(fit(), on="retain"), scope=unpruned(), epochs=epochs, batch_size=batch_size,
            optimizer=Optimizer("sgd", lr=lr, momentum=momentum, weight_decay=weight_decay), name="fine-tuning",
        ),
    ))  # fmt: skip
