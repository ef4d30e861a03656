"""Negative prompt: guidance starts from the concept instead of from nothing. The plain control beside SLD.

    e = e_S + w (e_p - e_S)          instead of e_0 + w (e_p - e_0);  w = 1 is no guidance, and then it does nothing

As a pipeline's own argument `negative_prompt`; compared with in SLD (Schramowski et al., https://arxiv.org/abs/2211.05105, sec. 6).
"""

from __future__ import annotations

from typing import Annotated

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.parts.guarded_diffusion import NegativePrompt, written
from expunge.parts.plan import Guard


@method(
    family="guarded", kinds=("diffusion",), intention="baseline", mechanism="negative prompt",
    paper="a pipeline's negative prompt; Schramowski et al., CVPR 2023, 2211.05105",
)  # fmt: skip
def negative_prompt(
    case: Case, concept: Annotated[str, setting("what guidance starts from: a prompt, or a class")]
) -> Guard:
    """Guide away from a concept by putting it in place of the empty prompt."""
    written(case.model, concept)
    return Guard(lambda bench: NegativePrompt(bench.model, concept), f"e_S + w (e_p - e_S), S = {concept}")
