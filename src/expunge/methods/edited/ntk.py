"""NTK forgetting: where training would have gone without the forget rows, by the network's linear approximation.

Paper: "Forgetting Outside the Box: Scrubbing Deep Networks of Information Accessible from Input-Output Observations",
Golatkar, Achille and Soatto, ECCV 2020, https://arxiv.org/abs/2003.02960. With f linearised at theta_0 and a ridge
pull N lambda towards it, training from theta_0 on rows D ends at theta_0 + w(D):

    w(D)     = -G (G^T G + N lambda I)^{-1} (f_0 - y),     G = d f / d theta at theta_0 (P x N K),  f_0 - y the residual
    theta_u  = theta_o + s (w(D_r) - w(D))

Residuals are softmax minus one-hot for classes (as the official code), prediction minus target for values. On a model
that is linear in its weights, trained on squared error with that pull, theta_u is the retrained model and s = 1.

s is the angle rule. Both ends of the true path are thought to miss their predictions in the same way (the legs of an
isosceles trapezium whose bases are the true and the predicted difference):  e = theta_o - theta_0 - w(D),
s = 1 + 2 |cos(e, delta)| ||e|| / ||delta||. Departure, and why: the official code takes w(D_r) for w(D) in e, which
triples the step on a model where the prediction is exact (a test shows it); `scale="code"` is that rule.

theta_0 are the fresh weights of the training seed (`initial_seed`), as in the paper. Without one the network is
linearised at the original itself, as the SSD repository's port does; there the residuals are nearly gone, and so is delta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.engine.per_example import gradient_matrix
from expunge.methods.registry import method, setting
from expunge.parts.plan import Edit
from expunge.seeds import generator
from expunge.tasks.base import Batch, Output, PerExample, evaluating

if TYPE_CHECKING:
    from expunge.cases.data import Split
    from expunge.engine.workbench import Workbench


def ridge_move(gram: Tensor, G: Tensor, residual: Tensor, pull: float) -> Tensor:
    """w (P,) = -G^T (G G^T + pull I)^{-1} residual for Jacobian rows G (R, P), residual (R,); gram (R, R) = G G^T."""
    system = gram.double() + pull * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return -(G.T @ torch.linalg.solve(system, residual.double()).to(G.dtype))


def angle_scale(delta: Tensor, error: Tensor) -> float:
    """1 + 2 |cos(error, delta)| ||error|| / ||delta||: how much longer the true base of the trapezium is."""
    length = float(delta.norm())
    return 1.0 + 2.0 * abs(float(delta @ error)) / length**2 if length > 0 else 1.0


@torch.no_grad()
def fresh_start(bench: Workbench, seed: int) -> nn.Module:
    """The weights that training began from; frozen ones were never drawn, so they are the original's."""
    start = bench.case.fresh(seed).to(bench.device)
    for name, p in bench.model.named_parameters():
        if not p.requires_grad:
            start.get_parameter(name).copy_(p)
    return start


def tangent(
    bench: Workbench, model: nn.Module, rows: Split, names: list[str], chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """Jacobian rows (n K, P) of the predictions and residuals (n K,), example by example, in eval mode."""
    found: list[tuple[Tensor, Tensor]] = []
    with evaluating(model), torch.enable_grad():
        for batch in bench.batches(rows, chunk):
            with torch.no_grad():
                f = bench.task.forward(model, batch).prediction.reshape(len(batch), -1)
            labels = batch[getattr(bench.task, "labels", "labels")]
            if "_classes" in batch.columns:
                residual = f.softmax(-1) - F.one_hot(labels, f.shape[1])
            else:
                residual = f - labels.reshape(len(batch), -1)
            columns = []
            for k in range(f.shape[1]):

                def output_k(output: Output, batch: Batch, k: int = k) -> PerExample:
                    return output.prediction.reshape(len(batch), -1)[:, k]

                columns.append(gradient_matrix(model, bench.task, batch, names, loss=output_k))
            found.append((torch.stack(columns, 1).flatten(0, 1), residual.flatten()))
    return torch.cat([G for G, _ in found]), torch.cat([r for _, r in found])


@method(
    family="edited", needs=("retain", "labels"), kinds=("classification", "regression"), intention="removal",
    mechanism="linearised retraining", paper="Golatkar et al., ECCV 2020, 2003.02960",
)  # fmt: skip
def ntk_forgetting(
    initial_seed: Annotated[
        int | None, setting("seed whose fresh weights training began from; none: linearise at the original")
    ] = None,
    weight_decay: Annotated[float, setting("lambda, the pull towards the start per row", gt=0)] = 0.1,
    scale: Annotated[
        float | Literal["angle", "code"], setting("factor of the step: a number, the angle rule, or the code's reading")
    ] = "angle",
    samples: Annotated[
        int, setting("rows of each split that are read; memory is samples x classes x weights", ge=1)
    ] = 200,
) -> Edit:
    """Step by the difference of two linearised trainings, without and with the forget rows."""

    @torch.no_grad()
    def apply(bench: Workbench) -> None:
        names = [name for name, p in bench.model.named_parameters() if p.requires_grad]
        start = bench.model if initial_seed is None else fresh_start(bench, initial_seed)
        parts = {
            on: bench.splits[on].sample(min(samples, len(bench.splits[on])), generator(bench.seed, "ntk", on))
            for on in ("retain", "forget")
        }
        (G_r, res_r), (G_f, res_f) = (tangent(bench, start, parts[on], names) for on in ("retain", "forget"))
        G, residual, count = torch.cat([G_r, G_f]), torch.cat([res_r, res_f]), len(parts["retain"])
        gram, kept = G @ G.T, len(G_r)
        without = ridge_move(gram[:kept, :kept], G_r, res_r, count * weight_decay)
        whole = ridge_move(gram, G, residual, (count + len(parts["forget"])) * weight_decay)
        delta = without - whole
        theta, origin = (
            torch.cat([dict(m.named_parameters())[n].flatten() for n in names]) for m in (bench.model, start)
        )
        error = theta - origin - (without if scale == "code" else whole)
        factor = angle_scale(delta, error) if isinstance(scale, str) else scale
        bench.note("scale", factor)
        bench.note("step_length", factor * float(delta.norm()))
        bench.note("prediction_error", float((theta - origin - whole).norm()))
        at = 0
        for name, p in bench.model.named_parameters():
            if name in names:
                p.add_(factor * delta[at : at + p.numel()].view_as(p))
                at += p.numel()

    times = f"{scale:g}·" if isinstance(scale, float) else "s·"
    return Edit(apply, f"θ ← θ + {times}(w(D_r) − w(D)), w(D) = −G(GᵀG + {weight_decay:g}·N·I)⁻¹(f₀ − y)")
