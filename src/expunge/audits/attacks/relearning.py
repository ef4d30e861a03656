"""Relearning: fine-tune a little and see whether the forgotten comes back faster than it would be learned anew.

    benign relearning   one epoch on the retain data alone: it shows nothing of what was forgotten, so what comes back
                        was still in the weights (audits card, 5: a published method went from 1% to 60% on digits)
    relearning          some steps on a tenth of the forget set, scored on the other nine tenths only: no scored row was
                        shown
    retraining on parts (RTT, arXiv 2410.08827) facts fall into independent parts (an author, a topic); fine-tune on all
                        parts but one, score the part left out, in turn: recovery of a part that was never shown

All are plans that the one loop runs. Every subject sees the same batches in the same order. With a `rank`, only low-rank
adapters move, and are merged.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from expunge.audits.attacks.budget import Attack, Budget, attack_check, forget_scores
from expunge.audits.attacks.unwrapping import innermost
from expunge.engine.loop import run_plan
from expunge.engine.workbench import Workbench
from expunge.errors import BadSetting, UnmetNeed
from expunge.parts.objectives import fit
from expunge.parts.plan import Plan, Term
from expunge.parts.scopes import everything, low_rank
from expunge.parts.stops import steps
from expunge.seeds import generator
from expunge.tasks.base import move_to_model

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case
    from expunge.cases.data import Split


@dataclass(frozen=True)
class BenignRelearning(Attack):
    """One epoch on the retain data at the recipe's rate."""

    @property
    def name(self) -> str:
        return "benign_relearning"

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        plan = Plan(
            Term(fit(), on="retain"),
            optimizer=budget.optimizer(case),
            epochs=budget.epochs,
            batch_size=budget.rows(case),
        )
        return trained(model, case, plan, case.split("retain"), seed)

    def skipped(self, subjects: Subjects) -> str | None:
        return subjects.unmet("retain")

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        rows = len(case.split("retain"))
        count = budget.epochs * -(-rows // budget.rows(case))
        return {"steps": count, "examples": 0, "queries": budget.epochs * rows}


@dataclass(frozen=True)
class Relearning(Attack):
    """Some steps on a part of the forget set, scored on the rest. share: of the recipe's step size, unless the budget sets
    one. rank: of adapters, 0 for all weights."""

    share: float = 0.1
    rank: int = 0

    @property
    def name(self) -> str:
        return f"relearning_lora_{self.rank}" if self.rank else "relearning"

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        return self._tuned(model, case, self._parts(case, budget, seed)[0], budget, seed)

    def _tuned(self, model: nn.Module, case: Case, places: torch.Tensor, budget: Budget, seed: int) -> nn.Module:
        """The copy after the budget's steps on these rows of the forget split."""
        rows = case.split("forget").subset(places, "relearned")
        per_epoch = -(-len(rows) // budget.rows(case))
        plan = Plan(
            Term(fit(), on="relearned"),
            scope=low_rank(self.rank, alpha=2 * self.rank) if self.rank else everything(),
            optimizer=budget.optimizer(case, share=self.share),
            epochs=-(-budget.steps // per_epoch),
            batch_size=budget.rows(case),
            stop=steps(budget.steps),
        )
        return trained(model, case, plan, rows, seed)

    def positions(self, case: Case, budget: Budget, seed: int) -> torch.Tensor | None:
        return self._parts(case, budget, seed)[1]

    def _parts(self, case: Case, budget: Budget, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(case.split("forget"))
        order = torch.randperm(n, generator=generator(seed, "relearned rows"))
        held = budget.held(n)
        return order[:held].sort().values, order[held:].sort().values

    def skipped(self, subjects: Subjects) -> str | None:
        if len(subjects.case.split("forget")) < 2:
            return "expected at least 2 forgotten rows, one to relearn and one to score, found 1"
        return None

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        held = budget.held(len(case.split("forget")))
        return {"steps": budget.steps, "examples": held, "queries": budget.steps * min(held, budget.rows(case))}


@dataclass(frozen=True)
class RetrainingOnParts(Relearning):
    """Relearning on all parts but one, scored on the one left out, each part in turn.

    column: what makes rows belong together, such as the author (facts of one author say something about each other, so
    they stay in one part). parts: at most so many; values of the column are dealt out in turn.
    """

    column: str = "author"
    parts: int = 5

    def __post_init__(self) -> None:
        if self.parts < 2:
            raise BadSetting(f"expected at least 2 parts, one to leave out, found {self.parts}; correct it")

    @property
    def name(self) -> str:
        return "retraining_on_parts"

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        raise UnmetNeed(
            "expected an attack of one model, found retraining on parts, which makes several; call scores(...)"
        )

    def positions(self, case: Case, budget: Budget, seed: int) -> None:
        return None

    def dealt(self, case: Case) -> np.ndarray:
        """(n,) the part of each forget row."""
        forget = case.split("forget")
        values = forget.data.column(self.column)
        own = [str(values[i].item() if isinstance(values[i], torch.Tensor) else values[i]) for i in forget.ids.tolist()]
        order = {value: number for number, value in enumerate(dict.fromkeys(own))}
        return np.array([order[value] % self.parts for value in own])

    def scores(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> np.ndarray:
        forget, part = case.split("forget"), self.dealt(case)
        found = np.zeros(len(forget))
        for number in np.unique(part):
            shown, left = (torch.from_numpy(np.flatnonzero(keep)) for keep in (part != number, part == number))
            copied = self._tuned(model, case, shown, budget, seed)
            found[left.numpy()] = forget_scores(copied, case, forget.subset(left), seed)
        return found

    def skipped(self, subjects: Subjects) -> str | None:
        names = subjects.case.split("forget").data.names
        if self.column not in names:
            return f"expected a column '{self.column}' that splits the facts into parts, found {', '.join(names)}"
        if len(np.unique(self.dealt(subjects.case))) < 2:
            return f"expected at least 2 values in the column '{self.column}' of the forget rows, found 1"
        return None

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        part = self.dealt(case)
        n, count = len(part), len(np.unique(part))
        return {
            "steps": count * budget.steps,
            "examples": n,
            "queries": count * budget.steps * min(n, budget.rows(case)),
        }


def trained(model: nn.Module, case: Case, plan: Plan, rows: Split, seed: int, *more: Split) -> nn.Module:
    """A copy after the plan on one split (or `more`), all weights live; a guard that passes no gradient is taken off first."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    probe = move_to_model(case.task.prepare(rows.data.fetch(rows.ids[:2]), generator(seed, "probe")), model)
    with torch.random.fork_rng(), torch.enable_grad():
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        if not case.task.forward(model, probe).prediction.requires_grad:
            model = innermost(model, case, seed)
        for module, training in modes:
            module.training = training
        place = next(model.parameters(), torch.empty(0)).device
        bench = Workbench(case, model, seed, place, splits={split.name: split for split in (rows, *more)})
        run_plan(plan, bench)
    return bench.model


benign_relearning = attack_check(
    BenignRelearning(),
    "What one epoch on the retain data alone brings back: a rise above the retrained model's is suppression.",
    needs=("retain",),
    source="audits card, 5 (benign relearn probe)",
)
relearning = attack_check(
    Relearning(),
    "What some steps on a tenth of the forget set bring back of the other nine tenths.",
    source="arXiv 2410.08827 (retraining on a part, scored on the rest)",
)
relearning_lora_8 = attack_check(
    Relearning(share=1.0, rank=8),
    "What some steps of rank-8 adapters on a tenth of the forget set bring back of the other nine tenths.",
    kinds=("language", "diffusion"),
    source="language attacks card, 3 (LoRA variant)",
)
retraining_on_parts = attack_check(
    RetrainingOnParts(),
    "What fine-tuning on all parts of the facts but one brings back of the part left out.",
    kinds=("language",),
    source="arXiv 2410.08827 (RTT)",
)
