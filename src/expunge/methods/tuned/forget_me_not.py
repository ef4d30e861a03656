"""Forget-Me-Not: the network is trained to look nowhere when it reads the concept's tokens. Nothing else, and nothing is kept.

Paper: "Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models", Zhang et al., 2023, https://arxiv.org/abs/2303.17591.

    min  || A[:, :, concept's positions] ||_2      A: probabilities of every cross-attention layer, head and pixel of the batch

not squared, so that its gradient does not fade. Inputs are noised images of the concept under "a photo of {concept}", or noise alone.
`use_pooler` takes the end tokens' positions too. Probabilities of a row sum to one, so what the concept loses other tokens gain.
Left out: textual inversion before it (500 steps for a token of the concept's own).
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Lr, Steps, counted
from expunge.parts.attention_maps import cross_attention
from expunge.parts.objectives.attention_norm import attention_norm
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import component


@method(
    family="tuned", kinds=("diffusion",), intention="removal", mechanism="attention re-steering",
    paper="Zhang et al., 2023, 2303.17591",
)  # fmt: skip
def forget_me_not(
    case: Case,
    concept: Annotated[str, setting("what to forget, in words; 'red | crimson' is either")],
    template: Annotated[
        str | None, setting("the prompt with {} for the words; none: the forget rows' own prompts")
    ] = "a photo of {}",
    use_pooler: Annotated[bool, setting("the end tokens' attention counts too")] = False,
    pure_noise: Annotated[bool, setting("noise instead of noised images of the concept")] = False,
    scope: Annotated[Literal["network", "attention"], setting("which weights move")] = "network",
    steps: Steps = 35,
    lr: Lr = 2e-6,
    batch_size: BatchSize = 1,
) -> Plan:
    """Minimise the attention that the concept's tokens get."""
    cross_attention(case.model, "forget_me_not")
    for words in concept.split("|"):
        case.model.conditions.words(words)
    objective = attention_norm(concept, template, use_pooler, pure_noise)
    return Plan(
        Term(objective, on="forget"), scope=component(scope), optimizer=Optimizer("adamw", lr=lr, weight_decay=0.01),
        mode="eval", **counted(case, steps, batch_size),
    )  # fmt: skip
