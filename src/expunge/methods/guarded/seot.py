"""SEOT: the end tokens of a prompt hold its concepts too, so the concept is taken out of them; nothing is trained.

Paper: "Get What You Want, Not What You Don't: Image Content Suppression for Text-to-Image Diffusion Models", Li et al., ICLR 2024,
https://arxiv.org/abs/2402.05375, sec. 3.2.

    X = [embeddings of the concept's tokens, and of every position from the end token on]   d x m
    X = U S V',    S <- S exp(-alpha S),    the columns go back to their places             from 0.2 of the sampling's steps on

What X's columns have in common, the concept, has the large singular values and vanishes. Prompts without the concept's tokens stay as
they are. With `iterations` (10 in the paper) embeddings are then optimised at every step of the sampling up to 0.4 of them (eq. 5-8):

    embeddings <- embeddings - 20 sqrt(f) grad L,   L = sum_other words (1 - cos(A, A')) - 0.5 sum_concept (1 - cos(A, A'))
                                                        + the same of the self-attention to the pixels where a word is looked at

A: attention maps of the bare model on its own way from the same noise; A': of the softened embeddings; f falls from 1 to 0.1.
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
    iterations: Annotated[
        int, setting("steps of gradient on embeddings at a sampling step; 0 for none, the paper's is 10", ge=0)
    ] = 0,
    until: Annotated[
        float, setting("share of the sampling's steps after which nothing is optimised", ge=0, le=1)
    ] = 0.4,
) -> Guard:
    """Suppress a concept by softening the singular values of its and the end tokens' embeddings."""
    cross_attention(case.model, "seot")
    for words in concept.split("|"):
        case.model.conditions.words(words)
    return Guard(
        lambda bench: SoftEndTokens(bench.model, concept, alpha, start, iterations, until),
        f"X = U S exp(-{alpha:g} S) V' over {concept} and end tokens"
        + (
            f", then {iterations} steps down (1 - cos) of other words' attention maps - 0.5 of the concept's"
            if iterations
            else ""
        ),
    )
