"""Weights of terms: numbers, schedules of the epoch, and Lagrange multipliers.

A schedule is a pure function of (epoch, epochs); a multiplier has one number of state that the loop keeps and saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from expunge.errors import BadSetting


@dataclass(frozen=True)
class Weight:
    """Base: `at(epoch, epochs)` with epoch counted from 0."""

    def at(self, epoch: int, epochs: int) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Weight):
    value: float

    def at(self, epoch: int, epochs: int) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True)
class Decay(Weight):
    """Linear decay: value * (1 - e / (E - rest)) for e < E - rest, then 0 (l1-sparse; Liu et al., 2304.04934)."""

    value: float
    rest: int = 0

    def at(self, epoch: int, epochs: int) -> float:
        live = epochs - self.rest
        if live <= 0:
            return self.value
        return self.value * (1 - epoch / live) if epoch < live else 0.0

    def __str__(self) -> str:
        return f"{self.value:g}↓"


@dataclass(frozen=True)
class Rise(Weight):
    """Linear rise from 0 in the first epoch to `value` in the last."""

    value: float

    def at(self, epoch: int, epochs: int) -> float:
        return self.value * epoch / max(epochs - 1, 1)

    def __str__(self) -> str:
        return f"{self.value:g}↑"


@dataclass(frozen=True)
class Until(Weight):
    """`value` in the first `epochs` epochs, then 0 (SCRUB's msteps)."""

    epochs: int
    value: float = 1.0

    def at(self, epoch: int, epochs: int) -> float:
        return self.value if epoch < self.epochs else 0.0

    def __str__(self) -> str:
        value = "" if self.value == 1.0 else f"{self.value:g}·"
        return f"{value}1[e≤{self.epochs}]"


@dataclass(frozen=True)
class Multiplier(Weight):
    """A Lagrange multiplier lambda of the constraint `mean loss of the term <= bound`.

    Dual ascent after each step: lambda <- max(0, lambda + rate * (loss - bound)). With a retain term and a bound just
    above the original's retain loss this is a utility floor as a constraint (PDU's rule).
    """

    bound: float
    start: float = 0.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.start < 0:
            raise BadSetting(
                f"expected rate > 0 and start >= 0, found rate={self.rate}, start={self.start}; correct them"
            )

    def at(self, epoch: int, epochs: int) -> float:
        return self.start

    def next(self, value: float, loss: float) -> float:
        """The multiplier after a step whose term had this mean loss."""
        return max(0.0, value + self.rate * (loss - self.bound))

    def __str__(self) -> str:
        return f"λ(≤{self.bound:g})"


def as_weight(weight: float | Weight) -> Weight:
    return weight if isinstance(weight, Weight) else Constant(float(weight))
