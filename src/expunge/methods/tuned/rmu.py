"""RMU: draw the activations of what goes to one random direction, and hold those of what stays.

Paper: Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", ICML 2024,
https://arxiv.org/abs/2403.03218.

    min_theta  gamma * E_{D_f} mean_t ||h_l(x)_t - u||^2 / d + alpha * E_{D_r} mean_t ||h_l(x)_t - h_l^o(x)_t||^2 / d
    u = c r / ||r||,  r ~ U[0, 1)^d, drawn once and kept; t runs over an example's own answer tokens

Defaults are the framework's (c 2, alpha 1, all weights); the original for WMDP is c 6.5, alpha 1200, lr 5e-5 and
`weights=("model.layers.5.mlp.down_proj.weight", ... 6, 7)`. The layer is the block at 7/32 of the depth (7 of 32, as both
have), or what goes into the last linear layer of a model that is no stack of blocks. Departure: an example's sum is divided by
its own count; the framework divides a (B,) sum by a (B, 1) count and so by every other example's length.
"""

from __future__ import annotations

from typing import Annotated

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Gamma, finetuning
from expunge.parts.architecture import representation
from expunge.parts.blocks import block_names, block_stack
from expunge.parts.objectives import hold, steer
from expunge.parts.plan import Plan, Term
from expunge.parts.scopes import layers


@method(
    family="tuned", needs=("retain", "labels"), intention="suppression", mechanism="representation",
    paper="Li et al., ICML 2024, 2403.03218",
)  # fmt: skip
@finetuning()
def rmu(
    case: Case,
    layer: Annotated[str | None, setting("layer of the activations; default: the block at 7/32 of the depth")] = None,
    strength: Annotated[float, setting("length of the random direction, c", gt=0)] = 2.0,
    gamma: Gamma = 1.0, alpha: Alpha = 1.0,
    weights: Annotated[tuple[str, ...], setting("patterns of the weights that may move; none: all")] = (),
) -> Plan:  # fmt: skip
    """Steer forget activations to a random direction and hold the others."""
    layer = layer or steered_layer(case)
    return Plan(
        Term(steer(layer, strength), on="forget", weight=gamma),
        *([Term(hold(layer), on="retain", weight=alpha)] if alpha else []),
        scope=layers(*weights) if weights else None,
    )  # fmt: skip


def steered_layer(case: Case) -> str:
    """The block at 7/32 of the depth, or what goes into the last linear layer."""
    if block_stack(case.model) is None:
        return representation(case.task, case.model, case.data)
    names = block_names(case.model)
    return names[round(len(names) * 7 / 32)]
