"""Extrapolation: adapt a copy of a GAN to what must go, and walk the other way in weight space.

Paper: the baseline "parameter-space direction" of Adapt-then-Unlearn, TMLR 2025, https://arxiv.org/abs/2309.14054.

    theta_N = theta_G adapted to the negatives (GAN training with a Fisher penalty)
    theta   <- theta_G - step (theta_N - theta_G)           generator alone

Task arithmetic (2212.04089) with the adversarial loss in the place of the likelihood: `task_vector` on a GAN would train the
generator against a discriminator that stands still. The same first stage as `adapt_then_unlearn`; nothing is trained afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch

from expunge.cases.case import Case
from expunge.engine.loop import run_plan
from expunge.methods.registry import method, setting
from expunge.methods.tuned.adapt_then_unlearn import (
    PAPER,
    R1,
    AdaptSteps,
    Ewc,
    FisherOver,
    Lr,
    Negatives,
    negative_adaptation,
)
from expunge.methods.tuned.common import BatchSize
from expunge.parts.plan import Edit

if TYPE_CHECKING:
    from expunge.engine.workbench import Workbench


@method(family="edited", kinds=("gan",), intention="baseline", mechanism="task arithmetic", paper=PAPER)
def extrapolation(
    case: Case,
    step: Annotated[float, setting("how far to walk away, in lengths of the vector", ge=0)] = 1.0,
    adapt_steps: AdaptSteps = 2000,
    negatives: Negatives = None,
    batch_size: BatchSize = 16,
    lr: Lr = 2e-3,
    ewc: Ewc = 5e8,
    fisher_over: FisherOver = "generator.*conv*",
    r1: R1 = 10.0,
) -> Edit:
    """Subtract the change that adaptation to the negatives makes to a GAN's generator."""
    plan = negative_adaptation(
        case, 0, adapt_steps=adapt_steps, negatives=negatives, ewc_weight=ewc, fisher_over=fisher_over, batch_size=batch_size,
        lr=lr, r1=r1,
    )  # fmt: skip

    def apply(bench: Workbench) -> None:
        run_plan(plan, bench)
        other, length = dict(bench.networks["negative_0"].named_parameters()), 0.0
        with torch.no_grad():
            for name, theta in bench.model.named_parameters():
                if theta.requires_grad and name.startswith("generator."):
                    vector = other[name].to(theta) - theta
                    length += float(vector.double().square().sum())
                    theta.sub_(step * vector)
        bench.note("direction_length", length**0.5)

    return Edit(apply, f"θ ← θ - {step:g}·(θ_N - θ), {plan}", {"passes": {"forget": plan.epochs}})
