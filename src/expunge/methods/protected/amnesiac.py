"""Amnesiac unlearning: keep the update of every batch that held a deletable row, and take it back on request.

Paper: "Amnesiac Machine Learning", Graves, Nagisetty and Ganesh, AAAI 2021, https://arxiv.org/abs/2010.10981.

    protect:  train as ever; of each update (e, b) whose batch holds a sensitive row, store Delta_{e,b} = after - before
    forget:   theta_u = theta - sum { Delta_{e,b} : batch b of epoch e held a forget row };  then repair epochs on D_r

Not exact: later updates were computed at weights that contained the removed ones. The paper's other method, wrong
labels on the forget rows, is random labelling (see the tuned methods). Departure: batch statistics of normalisation
layers are not taken back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from expunge.cases.case import Case
from expunge.cases.data import Split
from expunge.engine.execute import fit as train
from expunge.engine.loop import run_plan
from expunge.engine.workbench import Workbench
from expunge.errors import UnmetNeed
from expunge.methods.registry import method, setting
from expunge.parts.objectives import fit
from expunge.parts.objectives.base import Objective
from expunge.parts.plan import Edit, Optimizer, Plan, Term
from expunge.parts.step import Step
from expunge.tasks.base import PerExample
from expunge.tasks.classification import call_model


class Logged(Objective):
    """An objective that notes which rows each update read and where the weights were before it."""

    def __init__(self, inner: Objective, sensitive: Tensor):
        self.inner, self.reads, self.layers = inner, inner.reads, inner.layers
        self.sensitive = sensitive
        self.before: Tensor | None = None
        self.rows: list[Tensor] = []
        self.updates: list[Tensor] = []
        self.pending: Tensor | None = None

    def prepare(self, workbench: Any, split: str) -> Any:
        return self.inner.prepare(workbench, split)

    def __call__(self, step: Step) -> PerExample:
        self.close(step.model)
        hit = bool(self.sensitive[step.batch.ids].any())
        self.before = flat(step.model) if hit else None
        self.pending = step.batch.ids.clone() if hit else None
        return self.inner(step)

    def close(self, model: nn.Module) -> None:
        """The update that the last call led to is done: store it."""
        if self.before is not None and self.pending is not None:
            self.updates.append(flat(model) - self.before)
            self.rows.append(self.pending)
        self.before = self.pending = None

    def __str__(self) -> str:
        return str(self.inner)


def flat(model: nn.Module) -> Tensor:
    """(P,) a copy of all parameters, on the CPU."""
    return torch.cat([p.detach().reshape(-1).to("cpu", copy=True) for p in model.parameters()])


def subtract(model: nn.Module, total: Tensor) -> None:
    """theta <- theta - total (P,), in place."""
    start = 0
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(total[start : start + p.numel()].view_as(p).to(p))
            start += p.numel()


class AmnesiacModel(nn.Module):
    """A trained model with the log of its updates. Its output is the model's.

    State: model; updates (T, P); members (T, B) int64 row numbers of each logged batch, -1 where shorter; undone (T,)
    bool; live (N,) bool.
    """

    expunge_protection = "amnesiac"

    def __init__(
        self, model: nn.Module, updates: Sequence[Tensor], rows: Sequence[Tensor], live: Tensor, sensitive: Tensor
    ):
        super().__init__()
        self.model = model
        width = max((len(r) for r in rows), default=0)
        members = torch.full((len(rows), width), -1, dtype=torch.int64)
        for i, row in enumerate(rows):
            members[i, : len(row)] = row
        size = sum(p.numel() for p in model.parameters())
        self.register_buffer("updates", torch.stack(list(updates)) if updates else torch.zeros(0, size))
        self.register_buffer("members", members)
        self.register_buffer("undone", torch.zeros(len(rows), dtype=torch.bool))
        self.register_buffer("live", live)
        self.register_buffer("sensitive", sensitive)

    def forward(self, inputs: Tensor) -> Tensor:
        return call_model(self.model, inputs)

    def expunge_structure(self) -> dict[str, Any]:
        return {"rows": len(self.live), "updates": len(self.members), "batch": self.members.shape[1]}

    @classmethod
    def rebuilt(cls, base: nn.Module, rows: int, updates: int, batch: int) -> AmnesiacModel:
        model, nobody = copy.deepcopy(base), torch.zeros(rows, dtype=torch.bool)
        empty = torch.zeros_like(flat(model))
        batches = [torch.full((batch,), -1, dtype=torch.int64)] * updates
        return cls(model, [empty] * updates, batches, nobody, nobody.clone())

    def undo(self, ids: Tensor) -> int:
        """Take back every update, not yet taken back, whose batch held one of these rows; returns how many."""
        place = self.members.device
        other = ids[~(self.sensitive & self.live)[ids.to(place)].cpu()]
        if len(other):
            raise UnmetNeed(
                f"expected rows whose updates were logged and that are not forgotten yet, found {len(other)} others "
                "(first: "
                f"{other[:5].tolist()}); train with protect(case, 'amnesiac', sensitive='all'), or retrain"
            )
        hit = torch.isin(self.members, ids.to(place)).any(1) & ~self.undone
        subtract(self.model, self.updates[hit].sum(0))
        self.undone = self.undone | hit
        self.updates[hit] = 0  # an update is derived from the rows it held
        self.live[ids.to(place)] = False
        return int(hit.sum())

    def expunge_train(self, case: Case, rows: Split, seed: int) -> AmnesiacModel:
        """Trained from scratch on these rows, logging again."""
        return trained(case.with_(model=self.model), rows, seed, self.sensitive.cpu()).to(self.live.device)


def trained(case: Case, rows: Split, seed: int, sensitive: Tensor) -> AmnesiacModel:
    if case.recipe is None:
        raise UnmetNeed("expected the training recipe, found none; pass Case(recipe=Training(...))")
    log = Logged(case.recipe.objective or fit(), sensitive)
    model = train(case, rows, seed, recipe=replace(case.recipe, objective=log))
    log.close(model)
    live = torch.zeros(len(case.data), dtype=torch.bool)
    live[rows.ids] = True
    place = next(model.parameters()).device
    return AmnesiacModel(model, log.updates, log.rows, live, sensitive.clone()).to(place)


def train_logged(case: Case, seed: int, sensitive: str, **_: Any) -> nn.Module:
    """What `expunge.protect(case, "amnesiac")` returns."""
    marked = torch.ones(len(case.data), dtype=torch.bool)
    if sensitive == "request":
        marked = torch.zeros(len(case.data), dtype=torch.bool)
        marked[case.split("forget").ids] = True
    elif sensitive != "all":
        marked = torch.as_tensor(case.data.column(sensitive)).reshape(len(case.data)).bool()
    return trained(case, case.split("train"), seed, marked)


@method(
    family="protected", needs=("protection", "labels", "retain"), kinds=("classification", "regression"),
    intention="removal", mechanism="take back updates", paper="Graves et al., AAAI 2021, 2010.10981",
    learn=train_logged, rebuild=AmnesiacModel.rebuilt,
)  # fmt: skip
def amnesiac(
    sensitive: Annotated[
        str,
        setting("rows that may be deleted: 'all', 'request', or a column that is true for them (chosen at protect)"),
    ] = "all",
    repair_epochs: Annotated[int, setting("passes over the retain data after taking back", ge=0)] = 2,
    lr: Annotated[float, setting("step size of the repair", gt=0)] = 0.01,
    momentum: float = 0.9,
    batch_size: Annotated[int, setting("rows per repair step", ge=1)] = 64,
) -> Edit:
    """Subtract the stored updates of all batches that held forget rows, then repair on the retain data."""
    repair = Plan(
        Term(fit(), on="retain"), optimizer=Optimizer("sgd", lr=lr, momentum=momentum), epochs=repair_epochs,
        batch_size=batch_size,
    )  # fmt: skip

    def apply(bench: Workbench) -> None:
        model = bench.model
        if getattr(model, "expunge_protection", "") != "amnesiac":
            raise UnmetNeed("expected a model trained by expunge.protect(case, 'amnesiac'), found another; train it so")
        bench.note("updates_taken_back", model.undo(bench.splits["forget"].ids))
        bench.note("updates_logged", len(model.undone))
        retain = bench.splits["retain"]
        bench.splits["retain"] = retain.subset(model.live.cpu()[retain.ids].nonzero().squeeze(1))
        if repair_epochs:
            run_plan(repair, bench)

    return Edit(apply, f"theta -= sum Δ[batches with forget rows]; {repair}")
