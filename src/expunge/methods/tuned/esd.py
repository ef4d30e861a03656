"""ESD: what the original says without the concept, minus what the concept adds, becomes what the model says with it.

Paper: "Erasing Concepts from Diffusion Models", Gandikota et al., ICCV 2023, https://arxiv.org/abs/2303.07345, eq. 6.

    min  || o(z_t, c) - [ o0(z_t, "") - eta (o0(z_t, c) - o0(z_t, "")) ] ||^2        z_t by partial sampling, no images needed

z_t comes from sampling that stops on the way: by the student under guidance 3 (the first official code) or by the frozen original
(the second); which of them changes ESD's strength, so it is a setting. t is the sampler's own next timestep, as in the second code;
the first draws it from the band of 20 around. Attribute erasure: from another condition (`source`).
Scopes: x is cross-attention (styles, words), x_strict its keys and values, u all but it (concepts that appear unnamed), all.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Clip, Lr, Steps, counted
from expunge.parts.objectives import negated
from expunge.parts.objectives.redirect import Partial
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import component
from expunge.tasks.sampling import Sampling

ESD_SCOPES = {"x": "cross_attention", "x_strict": "cross_attention_kv", "u": "not_cross_attention", "all": "network"}
Concept = Annotated[
    str | None, setting("the concept's words, or class; none: each forget row's own condition, one per row")
]


@method(
    family="tuned", kinds=("diffusion",), intention="removal", mechanism="negative guidance",
    paper="Gandikota et al., ICCV 2023, 2303.07345",
)  # fmt: skip
def esd(
    case: Case,
    concept: Concept = None,
    scope: Annotated[Literal["x", "x_strict", "u", "all"], setting("which weights of the network move")] = "x",
    eta: Annotated[float, setting("strength of the negative guidance", gt=0)] = 1.0,
    source: Annotated[str | None, setting("erase from this condition instead of the concept's own")] = None,
    latents: Annotated[Literal["student", "original"], setting("whose partial sampling makes z_t")] = "student",
    steps: Steps = 1000,
    lr: Lr = 1e-5,
    batch_size: BatchSize = 1,
    sampling_steps: Annotated[int, setting("of the partial sampling", ge=1)] = 50,
    guidance: Annotated[float, setting("of the partial sampling, diffusers' convention", ge=1)] = 3.0,
    clip: Clip = None,
) -> Plan:
    """Train the concept's prediction towards its negative guidance; needs only the words."""
    start = Partial(latents, Sampling(sampling_steps, guidance), concept)
    return Plan(
        Term(negated(eta, concept, source, start), on="forget"),
        scope=component(ESD_SCOPES[scope]), optimizer=Optimizer("adam", lr=lr, clip=clip),
        mode="eval", **counted(case, steps, batch_size),
    )  # fmt: skip
