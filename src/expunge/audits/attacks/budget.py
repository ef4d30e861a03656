"""What all active attacks share: a budget, the frame of an attack, and its check.

An active attack takes a model and tries to bring the forgotten back: `run(model, case, budget, seed)` returns an
attacked copy, and the task's forget score of the copy says how much came back. Every subject (original, unlearned,
retrained, second retrained) is attacked with the same data, steps and seed, since much of what comes back is what the
attack itself teaches.

A success shows that something was there. A failure shows only that this budget did not find it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from expunge.audits.base import Measurement, check
from expunge.errors import BadSetting
from expunge.parts.plan import Optimizer
from expunge.seeds import derive, generator
from expunge.tasks.base import evaluating, move_to_model

if TYPE_CHECKING:
    from expunge.audits.base import Check
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case
    from expunge.cases.data import Split


@dataclass(frozen=True)
class Budget:
    """What an attacker may spend.

    steps: updates on forgotten examples. A class is learned anew from a handful of examples within some ten steps, by
    a retrained model too, and then nothing can be told apart: few steps tell most. examples: share of the forget set
    in the attacker's hands, or a count if above 1. epochs: passes of benign relearning over the retain data. queries:
    retain rows that a probe is fitted on, at most. learning_rate: None takes the recipe's for benign relearning and a
    tenth of it on forgotten examples (1e-3 with adam where the case has no recipe). batch_size: None takes the
    recipe's, else 64. own: (attack's name, its budget), for attacks that spend otherwise.
    """

    steps: int = 5
    examples: float = 0.1
    epochs: int = 1
    queries: int = 2000
    learning_rate: float | None = None
    batch_size: int | None = None
    own: tuple[tuple[str, Budget], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("steps", "examples", "epochs", "queries", "learning_rate", "batch_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadSetting(f"expected {name} of a budget above 0, found {value}; leave the attack out instead")

    def optimizer(self, case: Case, share: float = 1.0) -> Optimizer:
        """The recipe's optimizer at a constant rate, `share` of the recipe's unless the budget sets one."""
        known = case.recipe.optimizer if case.recipe is not None else Optimizer("adam", lr=1e-3)
        rate = self.learning_rate if self.learning_rate is not None else share * known.lr
        return Optimizer(known.name, lr=rate, momentum=known.momentum, weight_decay=known.weight_decay, clip=known.clip)

    def rows(self, case: Case) -> int:
        """Rows of a batch."""
        return self.batch_size or (case.recipe.batch_size if case.recipe is not None else 64)

    def held(self, forget: int) -> int:
        """Forgotten examples in the attacker's hands, of `forget`; at least 1, and at least 1 is left to score."""
        count = round(self.examples * forget) if self.examples <= 1 else int(self.examples)
        return min(max(count, 1), forget - 1)

    def of(self, attack: str) -> Budget:
        """What the attack of this name may spend."""
        return dict(self.own).get(attack, self)

    def describe(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "own"}


@dataclass(frozen=True)
class Attack:
    """Base of active attacks; subclasses are settings. `name` is what records call it."""

    @property
    def name(self) -> str:
        raise NotImplementedError

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        """An attacked copy; the given model stays as it is."""
        raise NotImplementedError

    def skipped(self, subjects: Subjects) -> str | None:
        """Why this attack does not apply to these subjects, or None if it does."""
        return None

    def positions(self, case: Case, budget: Budget, seed: int) -> torch.Tensor | None:
        """Places in the forget split that are scored (m,) int64; None for all of them."""
        return None

    def places(self, case: Case, budget: Budget, seed: int) -> np.ndarray | None:
        """Places of `scores` among the scores without an attack, (m,) int64; None for all of them."""
        found = self.positions(case, budget, seed) if case.exam is None else None
        return None if found is None else found.numpy()

    def scored(self, case: Case, budget: Budget, seed: int) -> Split:
        """The rows on which what came back is measured."""
        places, forget = self.positions(case, budget, seed), case.split("forget")
        return forget if places is None else forget.subset(places)

    def scores(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> np.ndarray:
        """(m,) forget scores of the attacked copy on the scored rows, higher = better known."""
        return forget_scores(self.run(model, case, budget, seed), case, self.scored(case, budget, seed), seed)

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        """What it spends: updates (`steps`), forgotten `examples` seen, `queries` (rows run through the model)."""
        return {"steps": 0, "examples": 0, "queries": 0}


@dataclass(frozen=True)
class Attacked:
    """Forget scores after an attack, (m,) for each subject in one order of rows.

    second: of a second retrained seed. rows: places among the scores without an attack, None for all. cost: what was spent.
    """

    original: np.ndarray
    unlearned: np.ndarray
    retrained: np.ndarray
    second: np.ndarray | None = None
    rows: np.ndarray | None = None
    budget: Mapping[str, Any] | None = None
    cost: Mapping[str, int] | None = None


def forget_scores(model: nn.Module, case: Case, split: Split, seed: int = 0, batch_size: int = 512) -> np.ndarray:
    """(n,) the task's forget score on a split, in eval mode, with the same draws for every model; where the case has an exam, of
    its answers in place of the split's rows (none of which an attack was shown)."""
    if case.exam is not None:
        return case.exam.recalled(model)
    parts = []
    with evaluating(model):
        for number, batch in enumerate(split.batches(batch_size)):
            batch = move_to_model(case.task.prepare(batch, generator(seed, "attack", split.name, number)), model)
            parts.append(case.task.forget_score(case.task.forward(model, batch), batch).double().cpu().numpy())
    return np.concatenate(parts)


Memory = dict[Any, np.ndarray]
"""(subject, attack, budget, seed) -> scores after the attack."""


def attacked(subjects: Subjects, attack: Attack, budget: Budget, memory: Memory | None = None) -> Attacked:
    """The attack on every subject with the same data, steps and seed; run once and kept with the subjects.

    memory: keeps the scores of all subjects but the unlearned one beyond these subjects (see `battery.attack_all`).
    """
    budget = budget.of(attack.name)

    def run() -> Attacked:
        case, seed = subjects.case, derive(subjects.seed, "attack", attack.name)
        known = {} if memory is None else memory
        scores = {}
        for subject in subjects.compared:
            key = (subject, attack, budget, seed)
            scores[subject] = known[key] if key in known else attack.scores(subjects.model(subject), case, budget, seed)
            if subject != "unlearned":
                known[key] = scores[subject]
        return Attacked(
            scores["original"],
            scores["unlearned"],
            scores["retrained"],
            scores.get("floor"),
            attack.places(case, budget, seed),
            budget.describe(),
            attack.cost(case, budget),
        )

    return subjects.memo(("attack", attack, budget), run)


def measure(item: Check, subjects: Subjects, attack: Attack, budget: Budget) -> list[Measurement]:
    """The attack's measurement: mean forget score after it; none where it does not apply."""
    if attack.skipped(subjects) is not None:
        return []
    found = attacked(subjects, attack, budget)
    scores = {"original": found.original, "unlearned": found.unlearned, "retrained": found.retrained}
    if found.second is not None:
        scores["floor"] = found.second
    measured = subjects.measure(lambda subject: scores[subject])
    kept = {subject: scores[subject].tolist() for subject in scores}
    spent = ", ".join(f"{count} {what}" for what, count in (found.cost or {}).items() if count) or "none"
    return [
        item.measurement(
            measured, name="forget_score", split="forget", per_example=kept, note=f"after {attack.name}; spent: {spent}"
        )
    ]


def attack_check(attack: Attack, summary: str, **facts: Any) -> Check:
    """Register an active attack as a check of its name, with the budget and the attack (one with other settings) as settings."""

    def function(subjects: Subjects, budget: Budget = Budget(), attack: Attack = attack) -> list[Measurement]:
        return measure(made, subjects, attack, budget)

    function.__doc__ = summary
    function.__module__ = type(attack).__module__
    needs = ("retrained", "forget", *facts.pop("needs", ()))
    made = check(attack.name, unit="forget score", direction="match", needs=needs, attack=True, **facts)(function)
    return made
