"""SEOT: the end tokens of a prompt hold its concepts too, so the concept is taken out of them; nothing is trained.

Paper: "Get What You Want, Not What You Don't: Image Content Suppression for Text-to-Image Diffusion Models", Li et al., ICLR 2024,
https://arxiv.org/abs/2402.05375, sec. 3.2.

    X = [embeddings of the concept's tokens, and of every position from the end token on]   d x m
    X = U S V',    S <- S exp(-alpha S),    the columns go back to their places             from 0.2 of the sampling's steps on

What X's columns have in common, the concept, has the large singular values and vanishes. Prompts without the concept's tokens stay as
they are. Left out: the optional optimisation of embeddings at every step by attention maps (lambda_r 1, lambda_e -0.5).
"""

from __future__ import annotations

from typing import Annotated

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.parts.attention_maps import cross_attention
from expunge.parts.guarded_diffusion import SoftEndTokens
from expunge.parts.plan import Guard


@method(
    family="guarded", kinds=("diffusion",), intention="suppression", mechanism="soft-weighted embeddings",
    paper="Li et al., ICLR 2024, 2402.05375",
)  # fmt: skip
def seot(
    case: Case,
    concept: Annotated[str, setting("what to suppress, in words as prompts hold them; 'red | crimson' is either")],
    alpha: Annotated[float, setting("how fast singular values vanish", ge=0)] = 1.0,
    start: Annotated[float, setting("share of the sampling's steps that is left as it is", ge=0, le=1)] = 0.2,
) -> Guard:
    """Suppress a concept by softening the singular values of its and the end tokens' embeddings."""
    cross_attention(case.model, "seot")
    for words in concept.split("|"):
        case.model.conditions.words(words)
    return Guard(
        lambda bench: SoftEndTokens(bench.model, concept, alpha, start),
        f"X = U S exp(-{alpha:g} S) V' over {concept} and end tokens",
    )
