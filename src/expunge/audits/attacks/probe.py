"""Linear probe: can a straight cut through the frozen features still tell what the output no longer says?

Logistic regression on standardised features (the input of the last linear layer that ran) of retain rows and of most
of the forget rows; the score of a forget row is the probability of its true class by a probe that was not fitted on
it (5 folds). A probe learns a class from the examples it is given, so the retrained model's probe is the zero line,
not guessing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from expunge.audits.attacks.budget import Attack, Budget, attack_check
from expunge.errors import UnmetNeed
from expunge.seeds import generator
from expunge.tasks.base import evaluating, move_to_model

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case
    from expunge.cases.data import Split

FOLDS = 5


def features(model: nn.Module, case: Case, split: Split, seed: int = 0, batch_size: int = 512) -> np.ndarray | None:
    """(n, D) input of the last `nn.Linear` that ran, float64; None where none ran or it has no row per example."""
    caught: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        caught[:] = [inputs[0].detach()]

    hooks = [m.register_forward_pre_hook(keep) for m in model.modules() if isinstance(m, nn.Linear)]
    parts = []
    try:
        with evaluating(model):
            for number, batch in enumerate(split.batches(batch_size)):
                batch = move_to_model(case.task.prepare(batch, generator(seed, "probe", split.name, number)), model)
                caught.clear()
                case.task.forward(model, batch)
                if not caught or caught[0].dim() != 2 or len(caught[0]) != len(batch):
                    return None
                parts.append(caught[0].double().cpu().numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate(parts) if parts else None


def probed(
    known: np.ndarray, known_labels: np.ndarray, hidden: np.ndarray, hidden_labels: np.ndarray, folds: np.ndarray
) -> np.ndarray:
    """(n,) probability of each hidden row's true class by the probe fitted on all known rows and the other folds.

    known (r, D), hidden (n, D): features; folds (n,): the fold of each hidden row. 0.0 for a class that no other
    row has.
    """
    from sklearn.linear_model import LogisticRegression

    scores = np.zeros(len(hidden))
    for fold in np.unique(folds):
        held = folds == fold
        x = np.concatenate([known, hidden[~held]])
        y = np.concatenate([known_labels, hidden_labels[~held]])
        centre, spread = x.mean(0), x.std(0)
        spread = np.where(spread > 0, spread, 1.0)
        classes = np.unique(y)
        if len(classes) < 2:
            scores[held] = hidden_labels[held] == classes[0]
            continue
        probe = LogisticRegression(max_iter=200, tol=1e-3).fit((x - centre) / spread, y)
        says = probe.predict_proba((hidden[held] - centre) / spread)
        place = np.searchsorted(classes, hidden_labels[held]).clip(max=len(classes) - 1)
        scores[held] = np.where(classes[place] == hidden_labels[held], says[np.arange(len(says)), place], 0.0)
    return scores


@dataclass(frozen=True)
class LinearProbe(Attack):
    """Cross-fitted logistic regression on frozen penultimate features; classification only."""

    @property
    def name(self) -> str:
        return "linear_probe"

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        raise UnmetNeed(
            "expected an attack that changes the model, found the linear probe, which reads it; call scores(...)"
        )

    def skipped(self, subjects: Subjects) -> str | None:
        case = subjects.case
        if case.task.name != "classification":
            return f"expected a classifier, found {case.task.name}"
        if len(case.split("forget")) < 2 or subjects.unmet("retain") is not None:
            return "expected at least 2 forgotten rows and some to keep, found fewer"
        row = case.split("forget").subset(torch.arange(1))
        models = [subjects.models[s] for s in ("original", "unlearned", "retrained", "floor") if s in subjects.models]
        if any(features(model, case, row) is None for model in models):
            return "expected a last linear layer that reads one row of features for each example, found none"
        return None

    def scores(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> np.ndarray:
        retain, forget = case.split("retain"), case.split("forget")
        if len(retain) > budget.queries:
            retain = retain.sample(budget.queries, generator(seed, "probe", "rows"))
        order = torch.randperm(len(forget), generator=generator(seed, "probe", "folds"))
        folds = np.empty(len(forget), dtype=np.int64)
        folds[order.numpy()] = np.arange(len(forget)) % min(FOLDS, len(forget))
        known, hidden = features(model, case, retain, seed), features(model, case, forget, seed)
        if known is None or hidden is None:
            raise UnmetNeed(
                "expected a model whose last linear layer reads one row of features for each example, found none; "
                "leave the linear probe out"
            )
        return probed(known, _labels(case, retain), hidden, _labels(case, forget), folds)

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        n, kept = len(case.split("forget")), min(len(case.split("retain")), budget.queries)
        return {"steps": 0, "examples": n - -(-n // min(FOLDS, n)), "queries": n + kept}


def _labels(case: Case, split: Split) -> np.ndarray:
    return np.concatenate([case.task.answers(batch).cpu().numpy() for batch in split.batches(4096)])


linear_probe = attack_check(
    LinearProbe(),
    "Probability of the true class by a linear probe on frozen features, on forget rows it was not fitted on.",
    needs=("retain",),
    kinds=("classification",),
    source="audits card, 5",
)
