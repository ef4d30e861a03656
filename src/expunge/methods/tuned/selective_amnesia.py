"""Selective Amnesia: fit a surrogate under the forgotten condition, replay the rest, and hold the weights that the rest needs.

Paper: "Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative Models", Heng and Soh, NeurIPS 2023,
https://arxiv.org/abs/2305.10120, eq. 7.

    min  E_{x ~ q} l(x, c*)  +  gamma E_{x ~ original(c)} l(x, c)  +  lam sum_k F_k (theta_k - theta0_k)^2
    F_k = E_{x ~ original} ( d sum_t l_t(x) / d theta_k )^2           l: squared error summed over the image's values

Diffusion. q: uniform noise in [-1, 1], or images that the original draws for an anchor. Retain images are the original's own: no data.
The loss here is a mean over the d values of an image, so the penalty's weight is 2 lam / d on the half quadratic, with F of the summed
loss: the same minimum and, but for `clip`, the same Adam steps; `clip` is given in the paper's unit. F sums `timesteps` of T, scaled by
T / timesteps; fewer raise F by their own noise.

Conditional variational autoencoder. l is minus the ELBO in nats, already a sum over values (d = 1, no timesteps); q is uniform noise over
the images' range. The released code adds lam sum F d^2 to sums over a batch of 256, not to means: its 100 is 100 / 256 of eq. 7's, and
would move with the batch size. Here lam is eq. 7's. Replayed images are drawn once (`images`), not anew at every step.
"""

from __future__ import annotations

import math
from typing import Annotated

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Clip, Lr, Steps, counted, there_and_back
from expunge.parts.objectives import drawn, fit, relabel
from expunge.parts.objectives.drawn import DrawnRows, asked_as
from expunge.parts.objectives.penalties import ewc
from expunge.parts.objectives.timesteps import OverTimesteps
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import component, everything
from expunge.tasks.sampling import Sampling


@method(
    family="tuned", needs=("retain",), kinds=("diffusion", "vae"), intention="removal", mechanism="relabel",
    paper="Heng and Soh, NeurIPS 2023, 2305.10120",
)  # fmt: skip
def selective_amnesia(
    case: Case,
    concept: Annotated[str | None, setting("the target's words, or class; needed with an anchor")] = None,
    anchor: Annotated[
        str | None, setting("words, or class, whose images stand under the target; none: uniform noise")
    ] = None,
    lam: Annotated[float, setting("weight of the penalty; 50 for Stable Diffusion", ge=0)] = 10.0,
    gamma: Annotated[float, setting("weight of the replayed images' loss", ge=0)] = 1.0,
    samples: Annotated[int, setting("images that the Fisher information is estimated on", ge=1)] = 5000,
    timesteps: Annotated[int, setting("per image of the estimate", ge=1)] = 1000,
    images: Annotated[int, setting("replayed images", ge=1)] = 5000,
    guidance: Annotated[float, setting("under which the original draws, diffusers' convention", ge=1)] = 3.0,
    sampling_steps: Annotated[int, setting("of the original's drawing", ge=1)] = 100,
    steps: Steps = 20000,
    lr: Lr = 1e-4,
    batch_size: BatchSize = 128,
    clip: Clip = 1.0,
) -> Plan:
    """Fit noise (or an anchor's images) under the condition, with replay and elastic weight consolidation."""
    sampling, values, energy, scope = Sampling(sampling_steps, guidance), 1, None, everything()
    if case.task.name == "diffusion":
        values, scope = math.prod(case.model.shape), component("network")
        energy = OverTimesteps(timesteps, scale=case.model.horizon * values)
    surrogate = relabel("noise")
    if anchor is not None:
        there, back = there_and_back(case, str(concept), anchor)
        surrogate = drawn(there, asked_as(back, fit()), images, sampling)
    hold = ewc(samples, of=DrawnRows("train", samples, sampling), energy=energy)
    return Plan(
        Term(surrogate, on="forget"), Term(drawn("own", fit(), images, sampling), on="retain", weight=gamma),
        *((Term(hold, on="retain", weight=2 * lam / values),) if lam else ()),
        scope=scope,
        optimizer=Optimizer("adam", lr=lr, clip=None if clip is None else clip / values),
        **counted(case, steps, batch_size),
    )  # fmt: skip
