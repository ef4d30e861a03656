"""Rewinding: keep the weights of every epoch and return one of them by a rule that never looks at `retrained`.

SCRUB+R (Kurmanji et al., NeurIPS 2023, sec. 3.3): a forget error far above the error on unseen data of the same kind
is a sign of its own (an attacker sees that these examples are treated specially). The final model's error on
`holdout` is the reference; the epoch whose forget error is nearest to it comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Measure = Callable[[str, str], float]
"""(split, key) -> a measurement of the model as it is now."""


@dataclass(frozen=True)
class Rewind:
    """key: the measurement compared, "utility" or any name that the task's `evaluate` returns."""

    key: str = "utility"

    def value(self, measure: Measure) -> float:
        """What is noted of each epoch."""
        return measure("forget", self.key)

    def reference(self, measure: Measure) -> float:
        """What the epochs are compared with; asked once, of the final model."""
        return measure("holdout", self.key)

    def choose(self, forget: Sequence[float], holdout: float) -> int:
        """forget: its value after each epoch. holdout: the final model's value. Returns the nearest epoch, counted
        from 0; of equally near ones the latest, which has had the most repair."""
        return min(range(len(forget)), key=lambda e: (abs(forget[e] - holdout), -e))

    def __str__(self) -> str:
        return f"rewound to {self.key}[forget] ≈ {self.key}[holdout]"


@dataclass(frozen=True)
class LowestJoint(Rewind):
    """The epoch with the lowest `weight * loss[retain] - min(loss[forget], bound)`, in nats; of equal ones the first.

    The bound is what makes it a rule: SHA256's own criterion (2504.12996) has none, and is lowest wherever the forget loss
    has run farthest.
    """

    weight: float = 1.0
    bound: float = 4.0

    def value(self, measure: Measure) -> float:
        return self.weight * measure("retain", "loss") - min(measure("forget", "loss"), self.bound)

    def reference(self, measure: Measure) -> float:
        return -self.bound

    def choose(self, forget: Sequence[float], holdout: float) -> int:
        return min(range(len(forget)), key=lambda e: forget[e])

    def __str__(self) -> str:
        return f"rewound to the lowest {self.weight:g}·loss[retain]-min(loss[forget],{self.bound:g})"


def lowest_joint(weight: float = 1.0, bound: float = 4.0) -> Rewind:
    """Return the epoch whose joint loss, with the forget loss counted up to `bound` nats, is lowest."""
    return LowestJoint(weight=weight, bound=bound)


def rewind(key: str = "utility") -> Rewind:
    """Return the epoch whose forget `key` is closest to the final model's on holdout."""
    return Rewind(key)
