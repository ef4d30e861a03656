"""Influence unlearning: one Newton-like step that takes back what the forget rows did to the weights.

Papers: "Understanding Black-box Predictions via Influence Functions", Koh and Liang, ICML 2017,
https://arxiv.org/abs/1703.04730, as an unlearning baseline ("IU") in "Model Sparsity Can Simplify Machine Unlearning",
Jia et al., 2304.04934, with the inverse of "WoodFisher", Singh and Alistarh, NeurIPS 2020, 2004.14340.

    theta_u = theta_o + alpha F^{-1} v,   v = (N_f/N) ( mean grad loss(D_f) - mean grad loss(D_r) )
    F       = (1/M) sum_i g_i g_i^T + delta I     over M retain examples
    F^{-1} v = ( v - G (M delta I + G^T G)^{-1} G^T v ) / delta,   G = [g_1 .. g_M]      (Woodbury, exact)

At an optimum of the loss on all data v = -grad L_r, so alpha = 1 is the damped Newton step to the retrained weights.
`fisher="model"` takes the examples' gradients over the model's own label distribution, columns sqrt(p_y) g_{i,y}: for a
model that is linear in its weights this F is the Hessian of the cross-entropy.

Departure, and why: the official code says WoodFisher but never recomputes F_n^{-1} g for a new g. Its vector stays
parallel to the first gradient, so that its answer is v minus a multiple of g_1: plain ascent minus descent. Here the
inverse is exact (M x M system in float64), and the recursion, written as published, is beside it as `woodfisher`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.engine.per_example import gradient_matrix
from expunge.errors import UnmetNeed
from expunge.methods.registry import FIXED_SIZE, method, setting
from expunge.parts.plan import Edit
from expunge.seeds import generator
from expunge.tasks.base import Batch, Output, PerExample, evaluating

if TYPE_CHECKING:
    from expunge.engine.workbench import Workbench


def woodbury(G: Tensor, v: Tensor, damping: float, count: int | None = None) -> Tensor:
    """((1/M) G^T G + damping I)^{-1} v for gradients as rows G (R, P) and v (P,), exactly. count: M, if it is not R."""
    M = count or G.shape[0]
    small = (G @ G.T).double()
    small.diagonal().add_(M * damping)
    inner = torch.linalg.solve(small, (G @ v).double())
    return (v - G.T @ inner.to(v.dtype)) / damping


def woodfisher(G: Tensor, v: Tensor, damping: float) -> Tensor:
    """The same by the rank-one recursion F_{n+1}^{-1} = F_n^{-1} - F_n^{-1} g g^T F_n^{-1} / (M + g^T F_n^{-1} g).

    F_n^{-1} g is recomputed for every g, from the M kept pairs; O(M^2 P).
    """
    M = G.shape[0]
    solved: list[Tensor] = []  # F_n^{-1} g_n / sqrt(M + g_n^T F_n^{-1} g_n)

    def apply(x: Tensor) -> Tensor:
        y = x / damping
        for u in solved:
            y = y - u * (u @ x)
        return y

    for g in G:
        f = apply(g)
        solved.append(f / (M + g @ f).sqrt())
    return apply(v)


def influence_direction(bench: Workbench) -> Tensor:
    """v = (N_f/N)(mean gradient on forget - mean gradient on retain), (P,) in the order of trainable parameters."""
    forget, retain = (bench.gradient(on, reduction="mean") for on in ("forget", "retain"))
    share = len(bench.splits["forget"]) / len(bench.splits["train"])
    return share * torch.cat([(forget[n] - retain[n]).flatten() for n in forget])


def retain_gradients(bench: Workbench, samples: int, fisher: str, chunk: int = 64) -> tuple[Tensor, int]:
    """Gradient rows (R, P) of at most `samples` retain examples, and their number M (R = M K for fisher="model")."""
    rows = bench.splits["retain"].sample(samples, generator(bench.seed, "influence", "rows"))
    parts = []
    with evaluating(bench.model), torch.enable_grad():
        for batch in bench.batches(rows, chunk):
            if fisher == "empirical":
                parts.append(gradient_matrix(bench.model, bench.task, batch))
                continue
            if "_classes" not in batch.columns:
                raise UnmetNeed("expected a classifier for fisher='model', found none; use fisher='empirical'")
            for y in range(batch["_classes"]):

                def energy(output: Output, batch: Batch, y: int = y) -> PerExample:
                    log_p = F.log_softmax(output.prediction, -1)[:, y]
                    return -(0.5 * log_p.detach()).exp() * log_p

                parts.append(gradient_matrix(bench.model, bench.task, batch, loss=energy))
    return torch.cat(parts), len(rows)


@method(
    family="edited", needs=("retain", "labels"), kinds=FIXED_SIZE, intention="removal", mechanism="influence",
    paper="Koh and Liang, ICML 2017, 1703.04730; Jia et al., 2304.04934",
)  # fmt: skip
def influence(
    alpha: Annotated[float, setting("length of the step; 1 is the Newton step at an optimum", ge=0)] = 1.0,
    damping: Annotated[float, setting("delta added to the information's diagonal", gt=0)] = 1e-2,
    samples: Annotated[int, setting("retain examples in the information; memory is samples x weights", ge=1)] = 500,
    fisher: Annotated[
        Literal["empirical", "model"],
        setting("gradients at the data's labels, or over the model's own label distribution"),
    ] = "empirical",
) -> Edit:
    """One step along the inverse information times (forget gradient minus retain gradient)."""

    @torch.no_grad()
    def apply(bench: Workbench) -> None:
        with torch.enable_grad():
            v = influence_direction(bench)
            G, count = retain_gradients(bench, samples, fisher)
        step = alpha * woodbury(G, v, damping, count)
        bench.note("step_length", float(step.norm()))
        bench.note("parallel_to_plain_gradient", float(torch.dot(step, v) / (step.norm() * v.norm()).clamp_min(1e-30)))
        start = 0
        for theta in (p for p in bench.model.parameters() if p.requires_grad):
            theta.add_(step[start : start + theta.numel()].view_as(theta))
            start += theta.numel()

    return Edit(apply, f"θ ← θ + {alpha:g}·F_r⁻¹·(N_f/N)(∇L_f − ∇L_r), F_r + {damping:g}·I by Woodbury")
