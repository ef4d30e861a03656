"""Embedded testbeds whose models are trained once and kept: where, and what each has beside its original."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from expunge.audits.golds import Gold, retrain
from expunge.cases import Case


def cache_home() -> Path:
    """Where trained testbeds are kept: EXPUNGE_CACHE, else .cache/expunge in the user's home."""
    return Path(os.environ.get("EXPUNGE_CACHE") or Path.home() / ".cache" / "expunge")


@dataclass(frozen=True)
class Trained:
    """case.model is the original; retrained and second are two seeds trained without the forget rows, kept under `cache`."""

    case: Case
    seed: int
    cache: Path

    @property
    def retrained(self) -> Gold:
        return retrain(self.case, self.seed + 1001, self.cache)

    @property
    def second(self) -> Gold:
        """Another seed of `retrained`: the next testbed's own, so that three seeds take four trainings and not six."""
        return retrain(self.case, self.seed + 1002, self.cache)
