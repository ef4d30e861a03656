"""SalUn for generation: the forget condition is answered as another, on the weights that its denoising error is most sensitive to.

Paper: "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image Classification and
Generation", Fan et al., ICLR 2024, https://arxiv.org/abs/2310.12508, section 4.

    m   = 1[ rank |sum_batches grad l_g(D_f)| < density * P ]       l_g: error of the guided prediction, one global ranking
    min   E ||o(x_t, c_f) - sg o(x_t, c')||^2  +  alpha E ||o(x_t, c_r) - target||^2     over m

Means over elements, so alpha = 3 here is the official 1e-3 times the 3,072 values of a CIFAR image. Both sides of the redirect
are the network as it is now; labels are dropped with probability `drop` in each of the three calls, as the official code does.
Clip before the mask, then Adam without decay: masked weights stay bit for bit. Departures from the ports of this method: the
mask keeps the LARGEST gradients, and is used (in UnlearnCanvas's port neither holds); one latent for both branches.
"""

from __future__ import annotations

from typing import Annotated

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Clip, Lr, Steps, counted
from expunge.parts.objectives import fit, guided_error, redirect, unconditioned
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import component, salient

Rule = Annotated[str, setting("the condition that stands in: next, a class, 'red -> plain', or a prompt")]
Drop = Annotated[float, setting("probability with which a condition is dropped in training", ge=0, lt=1)]


@method(
    family="tuned", needs=("retain",), kinds=("diffusion",), intention="removal", mechanism="redirect",
    paper="Fan et al., ICLR 2024, 2310.12508",
)  # fmt: skip
def salun_generation(
    case: Case,
    to: Rule = "next",
    density: Annotated[float, setting("share of weights that may move", ge=0, le=1)] = 0.5,
    alpha: Annotated[float, setting("weight of the retain loss", ge=0)] = 3.0,
    lr: Lr = 1e-4,
    steps: Steps = 1000,
    batch_size: BatchSize = 128,
    clip: Clip = 1.0,
    drop: Drop = 0.1,
    guidance: Annotated[float, setting("of the mask's loss, in diffusers' convention (1 + w)", ge=1)] = 3.0,
) -> Plan:
    """Answer the forget condition as another one, on the most salient half of the weights."""
    mask = salient(density, guided_error(guidance), batch_size=batch_size, clip=clip)
    return Plan(
        Term(redirect(to, drop=drop), on="forget"),
        Term(unconditioned(drop, fit()), on="retain", weight=alpha),
        scope=mask & component("network"),
        optimizer=Optimizer("adam", lr=lr, clip=clip), **counted(case, steps, batch_size),
    )  # fmt: skip
