"""Smooth unlearning: a forget loss made flat around the unlearned weights, so that a few steps of fine-tuning on forget data do
not bring it back. NPO by default, and any of the smoothers on any of the bases.

Paper: Fan et al., "Towards LLM Unlearning Resilient to Relearning Attacks: A Sharpness-Aware Minimization Perspective and
Beyond", ICML 2025, https://arxiv.org/abs/2502.05374.

    min_theta  max_{||delta|| <= rho}  gamma * l_f(theta + delta)  +  alpha * CE(D_r; theta)          (only l_f is perturbed)

    sam  grad l_f(theta + rho g/||g||)                 g = grad l_f, its norm over all weights together
    rs   mean of `draws` grad l_f(theta + sigma n)     n ~ N(0, I)
    gp   grad( l_f + lam ||g|| )
    cr   grad( l_f + lam ||grad l_f(theta + mu g/||g||) - g|| )
    wa   g; the mean of every fifth iterate of the last fifth comes out

Departures: NPO's sum over an answer's tokens (the official WMDP code puts the batch's token mean into the sigmoid, whence its
beta of .02); GP and CR are the equations, where the official penalty is a constant (`.item()`) with no gradient and CR's base
gradient counts twice. The published step sizes (5e-6 on a 7B model) and rho (.01) are the defaults; a model of half a million
weights wanted lr 2e-4 and rho .05.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.bases import Base, base_terms
from expunge.methods.tuned.common import Alpha, Average, Gamma, finetuning
from expunge.parts.adversaries import average as averaged
from expunge.parts.adversaries import curvature, gradient_penalty, sam, smooth
from expunge.parts.plan import Plan


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="adversarial training",
    paper="Fan et al., ICML 2025, 2502.05374",
)  # fmt: skip
@finetuning(lr=5e-6, batch_size=4, weight_decay=0.0)
def smooth_npo(
    case: Case,
    smoother: Annotated[Literal["sam", "rs", "gp", "cr", "wa"], setting("how the forget loss is made flat")] = "sam",
    base: Annotated[Base, setting("the forget loss")] = "npo",
    rho: Annotated[float, setting("radius of sam, L2 over all weights", ge=0)] = 0.01,
    sigma: Annotated[float, setting("standard deviation of rs, per weight", ge=0)] = 1e-4,
    draws: Annotated[int, setting("perturbations of rs in each step", ge=1)] = 3,
    lam: Annotated[float, setting("weight of the penalty of gp and cr", ge=0)] = 0.01,
    mu: Annotated[float, setting("step at which cr looks, and finite difference of gp", gt=0)] = 0.01,
    every: Annotated[int, setting("steps between two snapshots of wa", ge=1)] = 5,
    beta: Annotated[float, setting("inverse temperature of npo and simnpo", gt=0)] = 0.1,
    gamma: Gamma = 1.0, alpha: Alpha = 1.0, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """A forget loss that stays flat where it ends (SAM and its kin on NPO)."""
    hardened: dict[str, Any] = {
        "sam": {"adversary": sam(rho)},
        "rs": {"adversary": smooth(sigma, draws)},
        "gp": {"adversary": gradient_penalty(lam, mu)},
        "cr": {"adversary": curvature(lam, mu)},
        "wa": {"average": averaged(0.8, every)},
    }[smoother]
    return Plan(*base_terms(case, base, beta, gamma, alpha, average), **hardened)
