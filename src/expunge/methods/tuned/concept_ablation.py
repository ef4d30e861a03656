"""CA: the target prompt draws what the anchor prompt draws, learned on the anchor's own images.

Paper: "Ablating Concepts in Text-to-Image Diffusion Models", Kumari et al., ICCV 2023, https://arxiv.org/abs/2303.13516, eq. 4.

    min  || o(x_t, c*) - sg o(x_t, c_a) ||^2  [+ retain * || o(x_t, c_a) - e ||^2 ]       x: images that the original draws for c_a

c* is the anchor's prompt with the anchor's words replaced by the target's. The target branch is the network as it is now, not a
frozen copy. `noise_based` predicts the true noise under c* instead. Keys and values of the first text position carry no gradient
in the answered branch. Departure: no zoom-out augmentation.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Lr, Steps, WeightDecay, counted
from expunge.parts.objectives import drawn, fit, redirect
from expunge.parts.objectives.drawn import asked_as
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import component

CA_SCOPES = {"kv": "cross_attention_kv", "attention": "attention", "all": "network"}


@method(
    family="tuned", kinds=("diffusion",), intention="suppression", mechanism="redirect",
    paper="Kumari et al., ICCV 2023, 2303.13516",
)  # fmt: skip
def concept_ablation(
    case: Case,
    concept: Annotated[str, setting("the target's words, or class")],
    anchor: Annotated[str, setting("words, or class, of what is drawn instead")],
    scope: Annotated[Literal["kv", "attention", "all"], setting("which weights of the network move")] = "kv",
    noise_based: Annotated[bool, setting("predict the true noise under the target prompt")] = False,
    retain: Annotated[float, setting("weight of the denoising loss on the anchor's images", ge=0)] = 0.0,
    images: Annotated[int, setting("anchor images that the original draws", ge=1)] = 1000,
    steps: Steps = 100,
    lr: Lr = 8e-6,
    batch_size: BatchSize = 4,
    weight_decay: WeightDecay = 0.01,
) -> Plan:
    """Answer the target as the anchor, on images the original draws for the anchor."""
    if case.model.kind == "text":
        there, back = f"{concept} -> {anchor}", f"{anchor} -> {concept.split('|')[0].strip()}"
    else:
        there, back = anchor, concept
    ablate = asked_as(back, fit()) if noise_based else redirect("own", source=back, still_first=True)
    stay = (Term(drawn(there, fit(), images), on="forget", weight=retain),) if retain else ()
    return Plan(
        Term(drawn(there, ablate, images), on="forget"), *stay,
        scope=component(CA_SCOPES[scope]), optimizer=Optimizer("adamw", lr=lr, weight_decay=weight_decay),
        **counted(case, steps, batch_size),
    )  # fmt: skip
