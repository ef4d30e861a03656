"""CA: the target prompt draws what the anchor prompt draws, learned on the anchor's own images.

Paper: "Ablating Concepts in Text-to-Image Diffusion Models", Kumari et al., ICCV 2023, https://arxiv.org/abs/2303.13516, eq. 4.

    min  || o(x_t, c*) - sg o(x_t, c_a) ||^2  [+ retain * || o(x_t, c_a) - e ||^2 ]       x: images that the original draws for c_a

c* is the anchor's prompt with the anchor's words replaced by the target's. The target branch is the network as it is now, not a
frozen copy. `noise_based` predicts the true noise under c* instead. Keys and values of the first text position carry no gradient
in the answered branch. Departure: no zoom-out augmentation.
"""

from __future__ import annotations

from typing import Annotated

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
from expunge.parts.objectives import drawn, fit, redirect
from expunge.parts.objectives.drawn import asked_as
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import component


@method(
    family="tuned", kinds=("diffusion",), intention="removal", mechanism="redirect",
    paper="Kumari et al., ICCV 2023, 2303.13516",
)  # fmt: skip
def concept_ablation(
    case: Case,
    concept: Target,
    anchor: Anchor,
    scope: AnchorScope = "kv",
    noise_based: Annotated[bool, setting("predict the true noise under the target prompt")] = False,
    retain: Annotated[float, setting("weight of the denoising loss on the anchor's images", ge=0)] = 0.0,
    images: AnchorImages = 1000,
    steps: Steps = 100,
    lr: Lr = 8e-6,
    batch_size: BatchSize = 4,
    weight_decay: WeightDecay = 0.01,
) -> Plan:
    """Answer the target as the anchor, on images the original draws for the anchor."""
    there, back = there_and_back(case, concept, anchor)
    ablate = asked_as(back, fit()) if noise_based else redirect("own", source=back, still_first=True)
    stay = (Term(drawn(there, fit(), images), on="forget", weight=retain),) if retain else ()
    return Plan(
        Term(drawn(there, ablate, images), on="forget"), *stay,
        scope=component(ANCHOR_SCOPES[scope]), optimizer=Optimizer("adamw", lr=lr, weight_decay=weight_decay),
        **counted(case, steps, batch_size),
    )  # fmt: skip
