"""Pruning: set weights to zero. Forgetting that sits in many small changes, or in few weights of its own, falls out.

    by magnitude        the `share` of all weights of at least two dimensions with the least |W|, whatever their layer
                        (embeddings and output head of transformers models stay)
    by set difference   score |W * grad_W L| on the forget rows and on the retain rows; drop the weights that are in the top
                        q for forgetting but not in the top p for use (Wei et al., arXiv 2402.05162; of all p and q tried,
                        the attacker keeps the best that costs at most 2 points of utility)

Where equal magnitudes straddle a share, the earlier ones (in the model's order) go, so that the count is exact.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expunge.audits.attacks.budget import Attack, Budget, attack_check, forget_scores
from expunge.audits.attacks.quantisation import ends, matrices
from expunge.errors import BadSetting
from expunge.seeds import generator
from expunge.tasks.base import evaluating, move_to_model

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case
    from expunge.cases.data import Split


def smallest(weights: Sequence[Tensor], share: float) -> list[Tensor]:
    """A bool mask for each weight, True at the round(share * total) entries of least magnitude over all of them."""
    if not weights:
        return []
    flat = torch.cat([weight.detach().abs().reshape(-1).float() for weight in weights])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.sort(stable=True).indices[: round(share * len(flat))]] = True
    parts = chosen.split([weight.numel() for weight in weights])
    return [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]


@dataclass(frozen=True)
class Pruning(Attack):
    """`share` of all weights set to zero."""

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise BadSetting(f"expected a share of weights in (0, 1), found {self.share}; e.g. 0.2")

    @property
    def name(self) -> str:
        return f"pruning_{100 * self.share:g}"

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        model = copy.deepcopy(model)
        kept = ends(model)
        weights = [parameter for parameter, _ in matrices(model) if id(parameter) not in kept]
        with torch.no_grad():
            for weight, mask in zip(weights, smallest(weights, self.share), strict=True):
                weight.masked_fill_(mask, 0.0)
        return model


@dataclass(frozen=True)
class TargetedPruning(Attack):
    """Weights that matter to the forget rows and not to the retain rows set to zero.

    forget, use: shares q and p that are tried, every pair. loss: utility it may cost, in points of the task's utility on
    the retain rows (0.02 = 2 points); a model in which no pair brings anything back stays as it is.
    """

    forget: tuple[float, ...] = (0.01, 0.03)
    use: tuple[float, ...] = (0.01, 0.05, 0.1)
    loss: float = 0.02

    def __post_init__(self) -> None:
        for share in (*self.forget, *self.use):
            if not 0 < share < 1:
                raise BadSetting(f"expected shares of weights in (0, 1), found {share}; e.g. 0.01")

    @property
    def name(self) -> str:
        return "pruning_set_difference"

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        model, task = copy.deepcopy(model), case.task
        kept = ends(model)
        weights = [w for w, _ in matrices(model) if id(w) not in kept]
        forget, retain = (_some(case.split(name), budget, seed) for name in ("forget", "retain"))
        forgetting, use = (importance(model, case, weights, rows, seed) for rows in (forget, retain))
        rows = list(retain.batches(256))
        least = task.evaluate(model, rows)[task.utility] - self.loss
        saved = [w.detach().clone() for w in weights]
        best = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
        score = float(forget_scores(model, case, forget, seed).mean())
        with torch.no_grad():
            for q, p in itertools.product(self.forget, self.use):
                masks = set_difference(forgetting, use, q, p)
                for weight, mask in zip(weights, masks, strict=True):
                    weight.masked_fill_(mask, 0.0)
                if task.evaluate(model, rows)[task.utility] >= least:
                    found = float(forget_scores(model, case, forget, seed).mean())
                    best, score = (masks, found) if found > score else (best, score)
                for weight, value in zip(weights, saved, strict=True):
                    weight.copy_(value)
            for weight, mask in zip(weights, best, strict=True):
                weight.masked_fill_(mask, 0.0)
        return model

    def skipped(self, subjects: Subjects) -> str | None:
        return subjects.unmet("retain")

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        f, r = (min(len(case.split(name)), budget.queries) for name in ("forget", "retain"))
        pairs = len(self.forget) * len(self.use)
        return {"steps": 0, "examples": f, "queries": (pairs + 1) * (f + r) + r}


def importance(model: nn.Module, case: Case, weights: Sequence[Tensor], rows: Split, seed: int = 0) -> list[Tensor]:
    """|W * grad_W L| of each weight, L the mean loss of the rows; in eval mode."""
    total = [torch.zeros_like(weight) for weight in weights]
    live = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    with evaluating(model), torch.enable_grad():
        for number, batch in enumerate(rows.batches(64)):
            batch = move_to_model(case.task.prepare(batch, generator(seed, "attack", rows.name, number)), model)
            loss = case.task.loss(case.task.forward(model, batch), batch).sum() / len(rows)
            if not loss.requires_grad:
                break  # a guard that passes no gradient: nothing to go by
            for sum_, g in zip(total, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if g is not None:
                    sum_ += g
    for weight, was in zip(weights, live, strict=True):
        weight.requires_grad_(was)
    return [(weight.detach() * g).abs() for weight, g in zip(weights, total, strict=True)]


def set_difference(forget: Sequence[Tensor], use: Sequence[Tensor], q: float, p: float) -> list[Tensor]:
    """Masks, True in the top share q of `forget` over all weights and not in the top share p of `use`."""
    chosen, spared = smallest(forget, 1 - q), smallest(use, 1 - p)
    return [~low & keep for low, keep in zip(chosen, spared, strict=True)]


def _some(split: Split, budget: Budget, seed: int) -> Split:
    return (
        split if len(split) <= budget.queries else split.sample(budget.queries, generator(seed, "pruning", split.name))
    )


pruning_20 = attack_check(
    Pruning(0.2), "What pruning the smallest 20% of the weights brings back.", source="verdict card"
)
pruning_50 = attack_check(
    Pruning(0.5), "What pruning the smallest 50% of the weights brings back.", source="verdict card"
)
pruning_set_difference = attack_check(
    TargetedPruning(),
    "What removing the weights that matter to the forget rows and not to the retain rows brings back.",
    needs=("retain",),
    source="arXiv 2402.05162; language attacks card, 3",
)
