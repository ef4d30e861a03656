"""Scissorhands: draw anew the connections that the forget data hang on most, then train the rest back.

Paper: "Scissorhands: Scrub Data Influence via Connection Sensitivity in Networks", Wu and Harandi, ECCV 2024,
https://arxiv.org/abs/2401.06187.

    s_k = | theta_k * sum_batches |grad L_forget|_k |        one global ranking over the network; L_forget under guidance
    the top (1 - sparsity) share is drawn anew (cross-attention only: matrices N(0, 0.02) cut off, biases 0)
    min  || o(x', c) - e ||^2 [retain]  +  lam || o(x_t, c_f) - sg o(x_t, c') ||^2 [forget]
    optionally, every 10 updates: the step opposes no gradient of `memory` forget batches' ascent, taken after the re-draw (GEM)

The gradient's size is summed over batches (SalUn sums first and takes the size then). Departures: exactly the top share is drawn
anew, and only where `redraw` says (the official code draws anew in two layers of self-attention); the ridge of GEM's dual is
relative to its matrix (the official 1e-3 is larger than small gradients' products, and the constraint is then missed); class
models have no cross-attention, so there `redraw` and its scope are their attention or all.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Lr, Steps, counted
from expunge.parts.constrained import remembered
from expunge.parts.objectives import ascend, fit, guided_error, redirect
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import component, redrawn, sensitive


@method(
    family="tuned", needs=("retain",), kinds=("diffusion",), intention="removal", mechanism="redraw",
    paper="Wu and Harandi, ECCV 2024, 2401.06187",
)  # fmt: skip
def scissorhands(
    case: Case,
    to: Annotated[str, setting("the condition that stands in: next, a class, 'red -> plain', or a prompt")] = "next",
    sparsity: Annotated[float, setting("share of weights that stay as they are", ge=0, le=1)] = 0.9,
    redraw: Annotated[
        Literal["auto", "cross_attention", "attention", "network"],
        setting("where weights are drawn anew; auto: cross_attention, and attention where there is none"),
    ] = "auto",
    std: Annotated[float, setting("of the new weights", gt=0)] = 0.02,
    lam: Annotated[float, setting("weight of the redirect", ge=0)] = 0.1,
    memory: Annotated[int, setting("remembered gradients; 0: no projection", ge=0)] = 0,
    every: Annotated[int, setting("updates from one projection to the next", ge=1)] = 10,
    margin: Annotated[float, setting("least weight of a remembered gradient that is opposed", ge=0)] = 0.5,
    batches: Annotated[int, setting("forget batches that the sensitivity is summed over", ge=1)] = 10,
    guidance: Annotated[float, setting("of the sensitivity's loss, diffusers' convention (1 + w)", ge=1)] = 8.5,
    steps: Steps = 300,
    lr: Lr = 1e-5,
    batch_size: BatchSize = 16,
) -> Plan:
    """Draw the forget data's most sensitive connections anew, then retrain with a redirect."""
    place = redraw if redraw != "auto" else "cross_attention" if case.model.kind == "text" else "attention"
    chosen = sensitive(1 - sparsity, guided_error(guidance), batches, batch_size)
    return Plan(
        Term(redirect(to), on="forget", weight=lam), Term(fit(), on="retain"),
        scope=redrawn(chosen & component(place), std=std, moving=component("network")),
        balance=remembered(ascend(), memory, every, margin, batch_size) if memory else None,
        optimizer=Optimizer("adam", lr=lr), **counted(case, steps, batch_size),
    )  # fmt: skip
