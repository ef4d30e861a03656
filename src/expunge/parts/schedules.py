"""Weights of terms: numbers, schedules of the epoch, and weights that answer to their term's loss.

A schedule is a pure function of (epoch, epochs). A `Feedback` (Lagrange multiplier, `Drift`) has a little state, plain JSON,
that the loop keeps and saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


class Feedback(Weight):
    """Base of weights that depend on their term's losses so far; their state is plain JSON and begins as `start`."""

    start: Any

    def at(self, epoch: int, epochs: int) -> float:
        return self.value(self.start)

    def value(self, state: Any) -> float:
        """The weight in this state."""
        return float(state)

    def next(self, state: Any, loss: float, epoch: int) -> Any:
        """The state after an update of this epoch in which the term had this mean loss."""
        raise NotImplementedError


@dataclass(frozen=True)
class Multiplier(Feedback):
    """A Lagrange multiplier lambda of the constraint `mean loss of the term <= bound`.

    Dual ascent after each step: lambda <- max(0, lambda + rate * (loss - bound)). With a retain term and a bound just
    above the original's retain loss this is a utility floor as a constraint (PDU's rule).
    after: whole epochs before the first dual step; until then lambda is `start`.
    """

    bound: float
    start: float = 0.0
    rate: float = 1.0
    after: int = 0

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.start < 0:
            raise BadSetting(
                f"expected rate > 0 and start >= 0, found rate={self.rate}, start={self.start}; correct them"
            )

    def next(self, state: float, loss: float, epoch: int = 0) -> float:
        """The multiplier after a step of this epoch (from 0) whose term had this mean loss."""
        return state if epoch < self.after else max(0.0, state + self.rate * (loss - self.bound))

    def __str__(self) -> str:
        return f"λ(≤{self.bound:g})"


@dataclass(frozen=True)
class Drift(Feedback):
    """A weight that rises with the distance of the term's loss from its mean over the first epoch (SHA256; 2504.12996).

    In epoch 0 the weight is `low` and the baseline is the running mean of the term's losses. After it, with
    drift = max(0, loss - baseline), the weight is round(scale * base^drift + shift, 1), kept in low..high; the next update
    uses it. State: [weight, baseline, updates in the baseline].
    """

    scale: float = 0.3
    base: float = 6.0
    shift: float = 0.8
    low: float = 1.2
    high: float = 2.3

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise BadSetting(f"expected 0 <= low <= high, found low={self.low}, high={self.high}; correct them")

    @property
    def start(self) -> list[float]:  # type: ignore[override]
        return [self.low, 0.0, 0]

    def value(self, state: list[float]) -> float:
        return float(state[0])

    def of(self, drift: float) -> float:
        """The weight at a drift in nats; below 0 there is none."""
        raw = self.scale * self.base ** min(max(drift, 0.0), 64.0) + self.shift  # beyond 64 it would overflow
        return min(max(round(raw, 1), self.low), self.high)

    def next(self, state: list[float], loss: float, epoch: int) -> list[float]:
        _, baseline, count = state
        if epoch == 0:
            return [self.low, baseline + (loss - baseline) / (count + 1), count + 1]
        return [self.of(loss - baseline), baseline, count]

    def __str__(self) -> str:
        return f"{self.low:g}…{self.high:g}↑drift"


def as_weight(weight: float | Weight) -> Weight:
    return weight if isinstance(weight, Weight) else Constant(float(weight))
