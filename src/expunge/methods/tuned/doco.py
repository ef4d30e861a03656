"""DoCo: what the target prompt draws becomes indistinguishable from what the original draws for an anchor.

Paper: "Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving Gradient", Wu et al., AAAI 2025,
https://arxiv.org/abs/2405.15304.

    x_u = x(o(z_t, c*)),  x_a = x(o0(z_t, c))          clean latents at the same noisy image z_t of the anchor; o0 frozen
    D:      min BCE(D(x_a), 0) + BCE(D(x_u), 1)        a patch discriminator, alone for `warm_up` updates first
    theta:  g_u = grad BCE(D(x_u), 0),  g_r = grad ||o(z', c) - e||^2,  both clipped to norm 1
            theta <- AdamW( g_u - lambda <g_u, g_r>- / |g_r|^2 g_r )     in each tensor; g_r itself is never stepped

c* is the anchor's prompt with the anchor's words replaced by the target's; anchor images are what the original draws for the anchor.
Keys and values of the first text position carry no gradient in x_u. Departures: the projection is the true one (the official code
leaves out the factor |g_u|: `surgery="released"`); D draws rows and noise of its own, not the model's; no flips.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import (
    ANCHOR_SCOPES,
    Anchor,
    AnchorImages,
    AnchorScope,
    BatchSize,
    Lr,
    Steps,
    Target,
    WeightDecay,
    counted,
    there_and_back,
)
from expunge.parts.constrained import preserve
from expunge.parts.objectives import drawn, fit
from expunge.parts.objectives.domain import deceive_domain, domain_discriminator, tell_domains
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import component
from expunge.tasks.sampling import Sampling


@method(
    family="tuned", kinds=("diffusion",), intention="removal", mechanism="redirect",
    paper="Wu et al., AAAI 2025, 2405.15304",
)  # fmt: skip
def doco(
    case: Case,
    concept: Target,
    anchor: Anchor,
    scope: AnchorScope = "kv",
    surgery: Annotated[
        Literal["true", "released", "none"],
        setting("the preserving gradient; none: add 0.1 of the anchor's loss instead"),
    ] = "true",
    strength: Annotated[float, setting("of the surgery, lambda", ge=0)] = 1.0,
    steps: Steps = 1000,
    warm_up: Annotated[int, setting("updates of the discriminator before the model's first", ge=0)] = 1000,
    lr: Lr = 4.8e-5,
    discriminator_lr: Annotated[float, setting("step size of the discriminator; 5e-4 for styles", gt=0)] = 1e-4,
    batch_size: BatchSize = 8,
    weight_decay: WeightDecay = 0.01,
    images: AnchorImages = 1000,
    guidance: Annotated[float, setting("under which they are drawn, diffusers' convention", ge=1)] = 6.0,
) -> Plan:
    """Answer the target in the anchor's domain, by a discriminator, against no gradient of the anchor's own loss."""
    there, back = there_and_back(case, concept, anchor)
    sampling = Sampling(steps=25, guidance=guidance)
    told = tell_domains("own", source=back)
    correct = deceive_domain("own", source=back, still_first=True)
    balance = None if surgery == "none" else preserve(strength, clip=1.0, released=surgery == "released")
    return Plan(
        Term(drawn(there, correct, images, sampling), on="forget"),
        Term(drawn(there, fit(), images, sampling), on="forget", weight=1.0 if balance else 0.1),
        scope=component(ANCHOR_SCOPES[scope]), balance=balance,
        adversary=domain_discriminator(
            Term(drawn(there, told, images, sampling), on="forget"), lr=discriminator_lr, warm_up=warm_up
        ),
        optimizer=Optimizer("adamw", lr=lr, weight_decay=weight_decay), **counted(case, steps, batch_size),
    )  # fmt: skip
