"""SLD: guidance is turned away from a concept wherever it leads there; nothing is trained, the weights stay.

Paper: "Safe Latent Diffusion", Schramowski et al., CVPR 2023, https://arxiv.org/abs/2211.05105, eq. 3-8.

    mu    = min(1, s_S |e_p - e_S|)  where  e_p - e_S < lambda, else 0          element by element
    gamma = mu (e_S - e_0) + s_m nu,     nu <- beta nu + (1 - beta) gamma       nu = 0 at first, and kept from the first step on
    e     = e_0 + w (e_p - e_0 - gamma)  from step delta on, without gamma before

(delta, s_S, lambda, s_m, beta) by preset: weak (15, 200, 0, 0, 0), medium (10, 1000, .01, .3, .4), strong (7, 2000, .025, .5, .7),
max (0, 5000, 1, .5, .7), for 50 steps. Delta counts steps: one official port compares it with the scheduler's timestep, which is above
any delta until the end, so that its warm-up never is. Where a network predicts no noise, the differences under lambda are still those
of noise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.parts.guarded_diffusion import PRESETS, SafeGuidance, written
from expunge.parts.plan import Guard


@method(
    family="guarded", kinds=("diffusion",), intention="suppression", mechanism="safe guidance",
    paper="Schramowski et al., CVPR 2023, 2211.05105",
)  # fmt: skip
def sld(
    case: Case,
    concept: Annotated[str, setting("what guidance keeps away from: a prompt, or a class")],
    preset: Annotated[Literal["weak", "medium", "strong", "max"], setting("the paper's configurations")] = "medium",
    warm_up: Annotated[
        int | None, setting("sampling steps left as they are; none: the preset's, for 50 steps", ge=0)
    ] = None,
) -> Guard:
    """Turn guidance away from a concept while sampling."""
    written(case.model, concept)
    chosen = PRESETS[preset] if warm_up is None else replace(PRESETS[preset], warm_up=warm_up)
    return Guard(
        lambda bench: SafeGuidance(bench.model, concept, chosen), f"e_0 + w (e_p - e_0 - gamma({concept}, {preset}))"
    )
