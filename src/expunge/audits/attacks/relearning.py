"""Relearning: fine-tune a little and see whether the forgotten comes back faster than it would be learned anew.

    benign relearning   one epoch on the retain data alone: it shows nothing of what was forgotten, so what comes back
                        was still in the weights (audits card, 5: a published method went from 1% to 60% on digits)
    relearning          some steps on a tenth of the forget set, scored on the other nine tenths only: no scored row was
                        shown

Both are plans that the one loop runs. Every subject sees the same batches in the same order.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from expunge.audits.attacks.budget import Attack, Budget, attack_check
from expunge.audits.attacks.unwrapping import innermost
from expunge.engine.loop import run_plan
from expunge.engine.workbench import Workbench
from expunge.parts.objectives import fit
from expunge.parts.plan import Plan, Term
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
    """Some steps on a part of the forget set, scored on the rest."""

    @property
    def name(self) -> str:
        return "relearning"

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        rows = case.split("forget").subset(self._parts(case, budget, seed)[0], "relearned")
        per_epoch = -(-len(rows) // budget.rows(case))
        plan = Plan(
            Term(fit(), on="relearned"),
            optimizer=budget.optimizer(case, share=0.1),
            epochs=-(-budget.steps // per_epoch),
            batch_size=budget.rows(case),
            stop=steps(budget.steps),
        )
        return trained(model, case, plan, rows, seed)

    def positions(self, case: Case, budget: Budget, seed: int) -> torch.Tensor:
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


def trained(model: nn.Module, case: Case, plan: Plan, rows: Split, seed: int) -> nn.Module:
    """A copy after the plan on one split, all weights live; a guard that passes no gradient is taken off first."""
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
        bench = Workbench(case, model, seed, place, splits={rows.name: rows})
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
