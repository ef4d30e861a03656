"""FILA: low-rank adapters that begin in the part of each weight that matters to the forget rows and not to the retain rows.

Cha et al., "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs" (LoKU), ICLR 2025, 2408.06621. With the
Fisher information of batch means b, weighted by their answers n_b,

    F(W) = sum_b n_b (d/dW mean loss_b)^2 / sum_b n_b        I = F_forget / (F_retain + 1e-5)
    r_i  = sqrt( sum_j I_ij )                                B, A = argmin || diag(r) (W - s B A) ||_F   of the given rank
    W   <- W - s B A  (frozen),   s = alpha / rank

so that base and adapter together are the model as it was. With U S V' the singular value decomposition of diag(r) W, the
paper's A = sqrt(S/s) V' and B = diag(1/r) U sqrt(S/s) give s B A = W V V' on every row with r_i > 0: it is computed like
that, where the official code divides by r + 1e-5 and by a rounded S. Rows without importance stay out of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.parts.scopes.base import Scope
from expunge.parts.scopes.low_rank import LowRank, adaptable
from expunge.seeds import generator
from expunge.tasks.base import evaluating

LARGEST_EXACT = 1024
"""Smaller side of a matrix up to which its singular value decomposition is exact; beyond, a seeded random one."""


def answer_fisher(workbench: Any, model: nn.Module, on: Any, weights: list[Tensor], batch_size: int) -> list[Tensor]:
    """F of each weight (its shape, float32) over a split: squared gradients of batch means, weighted by their answers.

    The gradient is of a batch's mean over all its answers, so its square falls with the batch size; batch_size 1 gives the
    empirical Fisher information per example."""
    task = workbench.task
    total = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    answers = 0.0
    with evaluating(model), torch.enable_grad():
        for number, batch in enumerate(workbench.batches(on, batch_size, shuffled=True, purpose="fila")):
            batch = task.prepare(batch, generator(workbench.seed, "fila", "prepare", on.name, number))
            count = task.choices(batch)
            loss = (count * task.loss(task.forward(model, batch), batch)).sum() / count.sum()
            for t, g in zip(total, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if g is not None:
                    t.add_(g.float().square(), alpha=float(count.sum()))
            answers += float(count.sum())
    return [t / max(answers, 1.0) for t in total]


def weighted_split(weight: Tensor, rows: Tensor, rank: int, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) that minimise || diag(rows) (W - scaling B A) ||_F.

    weight: (out, in). rows: (out,) >= 0. Directions beyond the rank of diag(rows) W come out as zeros.
    """
    W, r = weight.double(), rows.double()
    if min(W.shape) <= LARGEST_EXACT:
        _, S, Vt = torch.linalg.svd(r[:, None] * W, full_matrices=False)
    else:
        _, S, V = torch.svd_lowrank(r[:, None] * W, q=min(rank + 8, *W.shape), niter=4)
        Vt = V.T
    S, Vt = S[:rank], Vt[:rank]
    live = 1e-12 * S.max().clamp_min(1e-300) < S
    root = torch.where(live, (S / scaling).sqrt(), 0.0)
    A = torch.zeros(rank, W.shape[1], dtype=W.dtype, device=W.device)
    B = torch.zeros(W.shape[0], rank, dtype=W.dtype, device=W.device)
    A[: len(S)] = root[:, None] * Vt
    B[:, : len(S)] = torch.where(live, (W @ Vt.T) / (scaling * root).clamp_min(1e-300), 0.0) * (r > 0)[:, None]
    return A.to(weight.dtype), B.to(weight.dtype)


@dataclass(frozen=True)
class FisherLowRank(LowRank):
    """retain_rows: rows of retain that F_retain is measured on; none: as many as there are to forget (the paper's pairs)."""

    batch_size: int = 2
    retain_rows: int | None = None

    def names(self, model: nn.Module) -> list[str]:
        return (
            super().names(model) if self.targets else (adaptable(model, ("Linear", "Conv1D")) or super().names(model))
        )

    def enter(self, model: nn.Module, workbench: Any) -> nn.Module:
        names = self.names(model)
        weights: list[Tensor] = [model.get_submodule(n).weight for n in names]  # type: ignore[misc]
        forget, retain = workbench.splits["forget"], workbench.splits["retain"]
        kept = retain.sample(self.retain_rows or len(forget), generator(workbench.seed, "fila", "retain"))
        F_f = answer_fisher(workbench, model, forget, weights, self.batch_size)
        F_r = answer_fisher(workbench, model, kept, weights, self.batch_size)
        adapted = super().enter(model, workbench)
        with torch.no_grad():
            for name, f, g in zip(names, F_f, F_r, strict=True):
                self._split(adapted.model.get_submodule(name), f / (g + 1e-5))  # type: ignore[union-attr, operator]
        return adapted

    def _split(self, layer: Any, importance: Tensor) -> None:
        """Move the weighted low-rank part of a peft layer's base weight into its adapter."""
        transposed = bool(getattr(layer, "fan_in_fan_out", False))  # GPT-2's Conv1D keeps its weight as (in, out)
        base, scaling = layer.base_layer.weight, layer.scaling["default"]
        weight, importance = (base.T, importance.T) if transposed else (base, importance)
        A, B = weighted_split(weight, importance.sum(1).sqrt(), self.rank, scaling)
        live = A.abs().sum(1) > 0  # a direction that is not there keeps the ordinary start: A random, B zero
        own = layer.lora_A["default"].weight
        own.copy_(torch.where(live[:, None], A, own))
        layer.lora_B["default"].weight.copy_(B)
        part = scaling * (B.double() @ A.double())
        base.sub_((part.T if transposed else part).to(base.dtype))

    def __str__(self) -> str:
        return f"fisher_low_rank({self.rank})"


def fisher_low_rank(
    rank: int = 32, alpha: float | None = None, targets: tuple[str, ...] = (), batch_size: int = 2,
    retain_rows: int | None = None,
) -> Scope:  # fmt: skip
    """Adapters that hold the forget-relevant low-rank part of each linear layer from the start (FILA), merged at the end.
    alpha: default 2 * rank. batch_size: of the information's batches."""
    return FisherLowRank(rank, 2.0 * rank if alpha is None else alpha, tuple(targets), batch_size, retain_rows)
