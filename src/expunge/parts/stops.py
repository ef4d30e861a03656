"""When to end. A stop is asked after every epoch (and after every step for divergence); stops join with `|`.

A stop may ask for a rollback: the loop then restores the best state it kept (the highest utility so far that met the stop's
condition, at worst the original), and the run's record says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from expunge.errors import BadSetting

FEW, MANY = 64, 512
"""Rows of the floor's first look, and rows that decide. An accuracy u over n rows has a standard error of sqrt(u (1 - u) / n):
at most 0.063 on 64 rows and 0.022 on 512. A model cleared by the first look is halfway between the floor and the original or
better: with the default floor (half of a nearly perfect original) four standard errors above it."""


class Measure(Protocol):
    def __call__(self, split: str, key: str, rows: int = 1000) -> float: ...


@dataclass(frozen=True)
class Progress:
    """What a stop sees. measure(split, key, rows) evaluates the model as it is now on one fixed sample of at most so many rows
    (once per update); original: the same of the original, on the very same rows (once per run)."""

    step: int
    epoch: int
    losses: dict[str, float]
    measure: Measure
    original: Measure


@dataclass(frozen=True)
class Halt:
    """Why to end, and whether to restore the best state kept so far."""

    reason: str
    rollback: bool = False
    warning: str = ""


class Stop:
    """Base of all stops."""

    keeps_best: bool = False

    def after_step(self, progress: Progress) -> Halt | None:
        return None

    def after_epoch(self, progress: Progress) -> Halt | None:
        return None

    def __or__(self, other: Stop) -> Stop:
        return Either(self, other)


@dataclass(frozen=True)
class Either(Stop):
    first: Stop
    second: Stop

    @property
    def keeps_best(self) -> bool:  # type: ignore[override]
        return self.first.keeps_best or self.second.keeps_best

    def after_step(self, progress: Progress) -> Halt | None:
        return self.first.after_step(progress) or self.second.after_step(progress)

    def after_epoch(self, progress: Progress) -> Halt | None:
        return self.first.after_epoch(progress) or self.second.after_epoch(progress)

    def __str__(self) -> str:
        return f"{self.first} or {self.second}"


@dataclass(frozen=True)
class Steps(Stop):
    count: int

    def after_step(self, progress: Progress) -> Halt | None:
        return Halt(f"{self.count} steps done") if progress.step >= self.count else None

    def __str__(self) -> str:
        return f"{self.count} steps"


@dataclass(frozen=True)
class ForgetReachesHoldout(Stop):
    tolerance: float = 0.0

    def after_epoch(self, progress: Progress) -> Halt | None:
        forget, holdout = progress.measure("forget", "loss"), progress.measure("holdout", "loss")
        if forget >= holdout - self.tolerance:
            return Halt(f"forget loss {forget:.4g} reached holdout loss {holdout:.4g}")
        return None

    def __str__(self) -> str:
        return "forget loss ≥ holdout loss"


@dataclass(frozen=True)
class Reaches(Stop):
    """A measurement reaches a value, from the side on which the original is. every: asked after so many updates; 0: after
    epochs only."""

    value: float
    key: str = "loss"
    split: str = "forget"
    every: int = 0

    def after_step(self, progress: Progress) -> Halt | None:
        return self.after_epoch(progress) if self.every and progress.step % self.every == 0 else None

    def after_epoch(self, progress: Progress) -> Halt | None:
        now, before = progress.measure(self.split, self.key), progress.original(self.split, self.key)
        if (now >= self.value) if before <= self.value else (now <= self.value):
            return Halt(f"{self.split} {self.key} {now:.4g} reached {self.value:.4g} (original {before:.4g})")
        return None

    def __str__(self) -> str:
        return f"{self.split} {self.key} reaches {self.value:g}"


@dataclass(frozen=True)
class UtilityFloor(Stop):
    """Utility on `split` may not fall below `keep` of the original's.

    "accuracy"-like utilities (0..1): at least keep * original. Errors (utility <= 0, e.g. minus the loss): the error may
    grow at most to original / keep. A few rows clear a model that is far above the floor; any doubt is settled on more.
    """

    keep: float = 0.5
    split: str = "retain"
    keeps_best = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise BadSetting(
                f"expected keep in (0, 1] (share of the original's utility), found {self.keep}; correct it"
            )

    def after_epoch(self, progress: Progress) -> Halt | None:
        for rows in (FEW, MANY):
            now, before = (m(self.split, "utility", rows) for m in (progress.measure, progress.original))
            floor = self.keep * before if before > 0 else before / self.keep
            if now >= (floor + before) / 2:
                return None
        if math.isnan(now) or now < floor:
            message = f"utility on {self.split} fell to {now:.4g}, below the floor {floor:.4g} (original {before:.4g})"
            return Halt(message, rollback=True, warning=message + "; the best earlier state was restored")
        return None

    def __str__(self) -> str:
        return f"utility[{self.split}] < {self.keep:g}·original"


@dataclass(frozen=True)
class Divergence(Stop):
    """A loss that is NaN or infinite ends the run and restores the last good state. Always on."""

    def after_step(self, progress: Progress) -> Halt | None:
        bad = [name for name, value in progress.losses.items() if not math.isfinite(value)]
        if bad:
            message = f"loss of {', '.join(bad)} became {progress.losses[bad[0]]} at step {progress.step}"
            return Halt(message, rollback=True, warning=message + "; the last good state was restored")
        return None

    def __str__(self) -> str:
        return "loss not finite"


def steps(count: int) -> Stop:
    """End after this many updates."""
    return Steps(count)


def forget_reaches_holdout(tolerance: float = 0.0) -> Stop:
    """End when the mean forget loss is within `tolerance` nats of the holdout's."""
    return ForgetReachesHoldout(tolerance)


def reaches(value: float, key: str = "loss", split: str = "forget", every: int = 0) -> Stop:
    """End at a stated level: when a measurement of the task ("loss", "probability", "accuracy", "utility") on a split reaches
    `value`, coming from where the original is. every: updates between two looks; 0: after each epoch."""
    return Reaches(value, key, split, every)


def utility_floor(keep: float = 0.5, split: str = "retain") -> Stop:
    """End and restore the best state when utility falls below `keep` of the original's."""
    return UtilityFloor(keep, split)


def divergence() -> Stop:
    """End and restore the last good state when a loss is NaN or infinite."""
    return Divergence()
