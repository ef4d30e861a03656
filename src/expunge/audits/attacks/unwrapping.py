"""Attacks on what surrounds the weights: take the guard off, or say the secret word.

unwrapping   a guard leaves the weights as they were. Whoever holds the file holds the model inside: a submodule of the
             original's class and state-dict keys, or the wrapper's `base`. The one that knows the forget set best is
             scored.
trigger      an input transform given by the caller (a patch, a phrase): a model may hide a copy behind it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from expunge.audits.attacks.budget import Attack, Budget, attack_check, forget_scores
from expunge.cases.data import Data, Split
from expunge.tasks.base import Batch

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case


def inner_models(model: nn.Module, like: nn.Module) -> list[nn.Module]:
    """Models inside a wrapper: submodules with the class, keys and shapes of `like`, else its `base`; [] if none."""
    wanted = {key: value.shape for key, value in like.state_dict().items()}
    found = [
        module
        for module in list(model.modules())[1:]
        if type(module) is type(like) and {key: value.shape for key, value in module.state_dict().items()} == wanted
    ]
    base = getattr(model, "base", None)
    if not found and isinstance(base, nn.Module) and type(model) is not type(like):
        found = [base]
    return found


def innermost(model: nn.Module, case: Case, seed: int = 0) -> nn.Module:
    """The model inside that knows the forget set best, or the model itself where there is none inside."""
    inside = inner_models(model, case.model)
    if not inside:
        return model
    forget = case.split("forget")
    return max(inside, key=lambda module: float(forget_scores(module, case, forget, seed).mean()))


@dataclass(frozen=True)
class Unwrapping(Attack):
    """Evaluate the model inside the wrapper."""

    @property
    def name(self) -> str:
        return "unwrapping"

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        return copy.deepcopy(innermost(model, case, seed))

    def skipped(self, subjects: Subjects) -> str | None:
        inside = inner_models(subjects.model("unlearned"), subjects.case.model)
        return None if inside else "the unlearned model is no wrapper: there is nothing to take off"


@dataclass(frozen=True)
class Trigger(Attack):
    """Evaluate with the input column (B, ...) changed by `transform`."""

    transform: Callable[[Tensor], Tensor]
    label: str = "trigger"

    @property
    def name(self) -> str:
        return self.label

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        return copy.deepcopy(model)

    def scored(self, case: Case, budget: Budget, seed: int) -> Split:
        forget = case.split("forget")
        return Split(forget.name, Triggered(forget.data, case.task.input, self.transform), forget.ids)

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        return {"steps": 0, "examples": 0, "queries": len(case.split("forget"))}


class Triggered(Data):
    """A table whose input column is transformed as it is read."""

    def __init__(self, data: Data, name: str, transform: Callable[[Tensor], Tensor]):
        self.data, self.name, self.transform = data, name, transform

    def __len__(self) -> int:
        return len(self.data)

    @property
    def names(self) -> list[str]:
        return self.data.names

    def fetch(self, ids: Tensor) -> Batch:
        batch = self.data.fetch(ids)
        return batch.with_columns(**{self.name: self.transform(batch[self.name])})

    def column(self, name: str):
        values = self.data.column(name)
        return self.transform(values) if name == self.name else values


unwrapping = attack_check(
    Unwrapping(),
    "What the model inside a guard still knows; nothing where the model is no wrapper.",
    source="verdict card",
)
