"""Rewinding: keep the weights of every epoch and return one of them by a rule that never looks at `retrained`.

SCRUB+R (Kurmanji et al., NeurIPS 2023, sec. 3.3): a forget error far above the error on unseen data of the same kind
is a sign of its own (an attacker sees that these examples are treated specially). The final model's error on
`holdout` is the reference; the epoch whose forget error is nearest to it comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rewind:
    """key: the measurement compared, "utility" or any name that the task's `evaluate` returns."""

    key: str = "utility"

    def choose(self, forget: Sequence[float], holdout: float) -> int:
        """forget: its value after each epoch. holdout: the final model's value. Returns the nearest epoch, counted
        from 0; of equally near ones the latest, which has had the most repair."""
        return min(range(len(forget)), key=lambda e: (abs(forget[e] - holdout), -e))

    def __str__(self) -> str:
        return f"rewound to {self.key}[forget] ≈ {self.key}[holdout]"


def rewind(key: str = "utility") -> Rewind:
    """Return the epoch whose forget `key` is closest to the final model's on holdout."""
    return Rewind(key)
