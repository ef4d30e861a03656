"""An objective asked about something else than its step's own batch: other answers, or the batch before an attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from expunge.errors import BadSetting
from expunge.parts.objectives.base import Objective, answered
from expunge.tasks.base import PerExample

if TYPE_CHECKING:
    from expunge.parts.step import Step


@dataclass(frozen=True)
class Wrapped(Objective):
    inner: Objective

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return self.inner.reads

    @property
    def layers(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.layers

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.beside

    def prepare(self, workbench: Any, split: str) -> Any:
        return self.inner.prepare(workbench, split)


@dataclass(frozen=True)
class Instead(Wrapped):
    policy: str = "other"

    def __post_init__(self) -> None:
        if self.inner.reads or self.inner.layers:
            raise BadSetting(
                f"expected an objective of the answers alone, found {self.inner}, which reads a frozen model or activations, "
                "and those are known for the rows' own answers only; wrap another one (fit, unlikelihood, ...)"
            )

    def __call__(self, step: Step) -> PerExample:
        batch = step.task.relabel(step.batch, step.rng, self.policy)
        other = step.again()
        other.batch, other._output, other.scratch = batch, answered(step, batch), {"memory": step.scratch.get("memory")}
        return self.inner(other)

    def __str__(self) -> str:
        return f"{self.inner}|{self.policy}"


@dataclass(frozen=True)
class Clean(Wrapped):
    def __call__(self, step: Step) -> PerExample:
        if step.clean is None:
            return self.inner(step)
        step.clean.scratch["memory"] = step.scratch.get("memory")
        return self.inner(step.clean)

    def __str__(self) -> str:
        return f"clean {self.inner}"


@dataclass(frozen=True)
class OneOf(Objective):
    choices: tuple[Objective, ...]

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(read for choice in self.choices for read in choice.reads))

    @property
    def layers(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(layer for choice in self.choices for layer in choice.layers))

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(split for choice in self.choices for split in choice.beside))

    def prepare(self, workbench: Any, split: str) -> Any:
        return [choice.prepare(workbench, split) for choice in self.choices]

    def __call__(self, step: Step) -> PerExample:
        chosen = int(torch.randint(len(self.choices), (1,), generator=step.rng))
        memory = step.scratch.get("memory")
        step.scratch["memory"] = None if memory is None else memory[chosen]
        return self.choices[chosen](step)

    def __str__(self) -> str:
        return f"one of {len(self.choices)}: {self.choices[0]}, ..."


def one_of(*choices: Objective) -> Objective:
    """At each update one of some objectives, drawn uniformly, for the whole batch."""
    return choices[0] if len(choices) == 1 else OneOf(choices)


def instead(policy: str, inner: Objective) -> Objective:
    """An objective of the answers that `task.relabel(policy)` draws, in place of the rows' own: `instead("refusal",
    unlikelihood())` pushes refusals away. For objectives of the answer alone (no frozen model, no activations)."""
    return Instead(inner, policy)


def clean(inner: Objective) -> Objective:
    """An objective that an adversary in input or latent space does not touch, on a split where the other terms are attacked."""
    return Clean(inner)
