"""What a run will cost, counted before it starts: updates, and rows that pass forward and backward, against the recipe.

The unit is one row through one forward and backward pass. A reference's or a scope's own pass over its split (once,
before the first update) and evaluations are left out; stops may end a run earlier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from expunge.cases.case import Case
from expunge.parts import adversaries as players
from expunge.parts.plan import Action, Edit, Exact, Plan, Training
from expunge.parts.schedules import Feedback


@dataclass
class Estimate:
    """updates: optimizer steps. rows: split -> rows that pass, repeated passes counted. work: the same, with each
    adversary's extra passes. fraction: work over the recipe's; None where it cannot be told. note: in words."""

    updates: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    work: float = 0.0
    fraction: float | None = None
    note: str = ""


def estimate(action: Action, case: Case) -> Estimate:
    """Count a plan's updates and rows; tell what is known of the other kinds."""
    sizes = {name: len(split) for name, split in case.splits.items()}
    whole = retraining(case.recipe, sizes["retain"]) if case.recipe is not None else None
    if isinstance(action, Plan):
        found = Estimate()
        for phase in action.phases or (action,):
            _add(found, phase, sizes)
    elif isinstance(action, Edit):
        passes = dict(action.notes.get("passes", {"forget": 1, "retain": 1}))
        rows = {name: round(count * sizes.get(name, 0)) for name, count in passes.items()}
        known = "declared by the method" if "passes" in action.notes else "assuming one pass over forget and retain"
        found = Estimate(0, rows, float(sum(rows.values())), note=f"one-shot edit, no updates; {known}")
    elif isinstance(action, Exact):
        return Estimate(note="exact: the rows that must be trained again depend on the request; retraining is the most")
    else:
        return Estimate(note="no weight is trained")
    if whole:
        found.fraction = found.work / whole.work if whole.work else None
    return found


def retraining(recipe: Training, rows: int) -> Estimate:
    """The recipe on the retain split."""
    updates = recipe.epochs * math.ceil(rows / recipe.batch_size)
    return Estimate(updates, {"retain": recipe.epochs * rows}, float(recipe.epochs * rows), 1.0)


def _add(found: Estimate, plan: Plan, sizes: Mapping[str, int]) -> None:
    """One phase, epoch by epoch, by the loop's rules for each rhythm."""
    sizes = {name: _pooled(dict(plan.pool).get(name), count) for name, count in sizes.items()}
    for epoch in range(plan.epochs):
        active = [
            t for t in plan.terms
            if isinstance(t.schedule, Feedback) or t.schedule.at(epoch, plan.epochs) != 0
        ]  # fmt: skip
        splits = {t.on: sizes.get(t.on, 0) for t in active if sizes.get(t.on, 0)}
        if not splits:
            continue
        batch = {
            name: next((t.batch_size for t in plan.terms if t.on == name and t.batch_size), plan.batch_size)
            for name in splits
        }
        laps = {name: math.ceil(count / batch[name]) for name, count in splits.items()}
        if plan.rhythm == "in_turn":
            updates, rows = sum(laps.values()), splits
        elif plan.rhythm == "mixed":
            updates, rows = math.ceil(sum(splits.values()) / plan.batch_size), splits
        else:
            updates = laps[plan.epoch_of] if plan.epoch_of in laps else max(laps.values())
            rows = {name: _cycled(count, batch[name], updates) for name, count in splits.items()}
        found.updates += updates
        for name, count in rows.items():
            found.rows[name] = found.rows.get(name, 0) + count
            found.work += count * _passes(plan, name)


def _pooled(amount: float | None, count: int) -> int:
    if amount is None:
        return count
    return min(count, max(round(amount * count) if isinstance(amount, float) and amount <= 1 else int(amount), 1))


def _cycled(count: int, batch: int, updates: int) -> int:
    """Rows of `updates` batches when a split of `count` rows goes round and round."""
    whole, rest = divmod(updates, math.ceil(count / batch))
    return whole * count + min(rest * batch, count)


def _passes(plan: Plan, split: str) -> float:
    """Forward-backward passes of one row of the split in one update."""
    every: Any = plan.adversary if isinstance(plan.adversary, tuple) else (plan.adversary,)
    total = float(
        max((a.repeats for a in every if a is not None), default=1)
    )  # updates under one attack, of all splits
    for adversary in every:
        if adversary is None or adversary.on != split:
            continue
        if adversary.space in ("inputs", "latents"):
            total += adversary.steps
        elif isinstance(adversary, players.RandomSmoothing):
            total *= adversary.draws
        elif isinstance(adversary, players.Curvature):
            total *= 4
        else:
            total *= 2  # SAM and the gradient penalty: one pass to find the direction, one at its end
    return total
