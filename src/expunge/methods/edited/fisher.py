"""Fisher forgetting: add Gaussian noise to each weight, the more the less the retain data care about it.

Paper: "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks", Golatkar et al., CVPR 2020,
https://arxiv.org/abs/1911.04933. With the Fisher information per example, over the model's own label distribution:

    F_p   = mean_{x in D_r} sum_y p(y|x) ( d(-log p(y|x))/d theta_p )^2
    theta <- theta + std(F) N(0, 1)

The paper's optimum has std ~ F^(-1/4); the official code has the variance alpha min(1/(F + 1e-8), cap), i.e.
std ~ F^(-1/2). `exponent` chooses ("code" is the default: published numbers come from it); under "paper" the variance
is alpha min(1/(F + 1e-8), cap)^(1/2). The rest follows the official code: cap 1e3, 1e2 in the output layer; the
variance of a matrix or kernel averaged over its inputs (dimension 1); ten times the variance in the output layer and in
vectors; where whole classes go, the output row of each has mean 0 and variance 1e-4 (before the factor ten).

Departure: the output layer is the last linear one that a forward pass calls, where the code takes every tensor whose
first size is the number of classes. (In one port the class branch is never reached: it asks for `class is None`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.engine.per_example import squared_gradient_sum
from expunge.methods.registry import method, setting
from expunge.parts.architecture import last_linear
from expunge.parts.plan import Edit
from expunge.seeds import generator
from expunge.tasks.base import Batch, Output, PerExample, evaluating

if TYPE_CHECKING:
    from expunge.engine.workbench import Workbench

CLASS_VARIANCE = 1e-4


def own_label_fisher(bench: Workbench, on: str, samples: int | None = None, chunk: int = 64) -> dict[str, Tensor]:
    """mean_x sum_y p(y|x) (d(-log p(y|x))/d theta)^2 in eval mode, parameter name -> its shape.

    One pass per class: the loss sqrt(p_y) (-log p_y) with the root held fixed has the square p_y g_y^2.
    """
    rows = bench.splits[on]
    if samples is not None and len(rows) > samples:
        rows = rows.sample(samples, generator(bench.seed, "fisher", "rows"))
    total: dict[str, Tensor] = {}
    with evaluating(bench.model), torch.enable_grad():
        for batch in bench.batches(rows, chunk):
            for y in range(batch["_classes"]):

                def energy(output: Output, batch: Batch, y: int = y) -> PerExample:
                    log_p = F.log_softmax(output.prediction, -1)[:, y]
                    return -(0.5 * log_p.detach()).exp() * log_p

                for name, value in squared_gradient_sum(
                    bench.model, bench.task, batch, chunk=chunk, loss=energy
                ).items():
                    total[name] = total[name] + value if name in total else value
    return {name: value / len(rows) for name, value in total.items()}


def noise_variance(fisher: Tensor, alpha: float, exponent: str = "code", output_layer: bool = False) -> Tensor:
    """The variance of a parameter's noise from its Fisher information, before any class row is treated.

    The factor ten (output layer, vectors) comes after that, as in the official code.
    """
    cap = 1e2 if output_layer else 1e3
    inverse = (1.0 / (fisher + 1e-8)).clamp(max=cap)
    variance = alpha * (inverse if exponent == "code" else inverse.sqrt())
    return variance.mean(1, keepdim=True).expand_as(fisher).clone() if fisher.dim() > 1 else variance


@method(
    family="edited", needs=("retain", "labels"), kinds=("classification",), intention="removal", mechanism="noise",
    paper="Golatkar et al., CVPR 2020, 1911.04933",
)  # fmt: skip
def fisher_forgetting(
    alpha: Annotated[float, setting("strength: variance per inverse information", ge=0)] = 3e-6,
    exponent: Annotated[
        Literal["code", "paper"], setting("std ~ F^(-1/2) as the code, or F^(-1/4) as the paper")
    ] = "code",
    samples: Annotated[int | None, setting("retain rows the information is measured on; default: all", ge=1)] = None,
    class_rows: Annotated[bool, setting("reset the output rows of classes that go as a whole")] = True,
) -> Edit:
    """Noise the weights in inverse proportion to what the retain data know through them."""

    @torch.no_grad()
    def apply(bench: Workbench) -> None:
        information = own_label_fisher(bench, "retain", samples)
        head = last_linear(bench.task, bench.model, bench.case.data)
        gone = forgotten_classes(bench) if class_rows else []
        rng = generator(bench.seed, "fisher", "noise")
        for name, theta in bench.model.named_parameters():
            if name not in information:
                continue
            in_head = name.rpartition(".")[0] == head
            variance = noise_variance(information[name], alpha, exponent, in_head)
            mean = theta.clone()
            if in_head and gone:
                mean[gone], variance[gone] = 0.0, CLASS_VARIANCE
            if in_head or theta.dim() == 1:
                variance = 10 * variance
            theta.copy_(mean + variance.sqrt() * torch.randn(theta.shape, generator=rng).to(theta))
        bench.note("forgotten_classes", gone)
        bench.note("mean_information", float(torch.cat([f.flatten() for f in information.values()]).mean()))

    return Edit(apply, f"θ ← θ + ({alpha:g}·F_r^{'-1' if exponent == 'code' else '-1/2'})^½·N(0, 1)")


def forgotten_classes(bench: Workbench) -> list[int]:
    """The classes that go as a whole: asked for by a class request, none left in the retain rows."""
    if bench.case.request.describe().get("kind") != "class":
        return []
    labels = bench.case.data.column(getattr(bench.task, "labels", "labels"))
    assert isinstance(labels, Tensor)
    kept = set(labels[bench.splits["retain"].ids].tolist())
    return sorted(set(labels[bench.splits["forget"].ids].tolist()) - kept)
