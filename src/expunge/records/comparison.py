"""Several results on the same case side by side: methods x seeds, with means and 95% intervals over seeds.

The interval is Student's: mean +- t(0.975, n - 1) * s / sqrt(n), with s the standard deviation over seeds (n - 1 in its
denominator). One seed has no interval, and none is invented.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from expunge.records.canonical import canonical, plain
from expunge.records.results import Measurement, Record, Results, StoredRecord

Key = tuple[str, str, str]
"""check, name, split"""


class Summary(Record):
    """A mean over seeds; `low` and `high` bound its 95% interval and are None for fewer than two seeds."""

    mean: float
    low: float | None
    high: float | None
    n: int


class MethodRow(Record):
    """One method (with one set of settings) over its seeds.

    values: measurement -> subject ("original", "unlearned", "retrained", "floor", "gap") -> summary over seeds.
    """

    label: str
    runs: tuple[Results, ...]
    values: dict[Key, dict[str, Summary]]

    @property
    def verdicts(self) -> dict[str, int]:
        """Verdict -> how many seeds came out so, most frequent first."""
        words = [run.verdict.verdict for run in self.runs if run.verdict is not None]
        return {word: words.count(word) for word in sorted(set(words), key=lambda w: (-words.count(w), w))}

    def cost(self, name: str) -> Summary | None:
        """Summary of `seconds`, `relative` or `peak_memory_mb` over the seeds that have it."""
        return t_summary(getattr(run.cost, name) for run in self.runs)


class Comparison(StoredRecord):
    """Results of one case; all must share the data's fingerprint, the request and the task."""

    kind: ClassVar[str] = "a comparison"

    schema_name: Literal["expunge.comparison/1"] = Field(default="expunge.comparison/1", alias="schema")
    results: tuple[Results, ...] = Field(min_length=1)
    command: str = ""

    @model_validator(mode="after")
    def _one_case(self) -> Self:
        first, seen = self.results[0].case, set()
        for run in self.results:
            what = [name for name in ("task", "request", "data") if getattr(run.case, name) != getattr(first, name)]
            if what:
                raise ValueError(
                    f"expected results of one case, found another {' and '.join(what)} for method '{run.method.name}'; "
                    "compare the cases separately"
                )
            identity = (_method_key(run), run.seeds)
            if identity in seen:
                raise ValueError(
                    f"expected each method and seed once, found '{run.method.name}' twice with {run.seeds}; "
                    "a repeated run would make the interval look narrower than it is, so leave one out"
                )
            seen.add(identity)
        return self

    @classmethod
    def of(cls, results: Iterable[Results | str | os.PathLike[str]], command: str = "") -> Self:
        """A comparison of results or of `results.json` files."""
        loaded = [item if isinstance(item, Results) else Results.load(Path(item)) for item in results]
        return cls.from_dict({"results": loaded, "command": command}, "the given results")

    def keys(self) -> list[Key]:
        """Every measurement and attack of any run, in the order of first appearance."""
        return list(dict.fromkeys(row.key for run in self.results for row in (*run.measurements, *run.attacks)))

    def measurement(self, key: Key) -> Measurement:
        """One run's measurement of that key, for its unit, direction and range."""
        return next(row for run in self.results for row in (*run.measurements, *run.attacks) if row.key == key)

    def rows(self) -> list[MethodRow]:
        """One row for each method and settings, in the order of first appearance."""
        groups: dict[tuple[str, bytes], list[Results]] = {}
        for run in self.results:
            groups.setdefault(_method_key(run), []).append(run)
        labels = _labels([runs[0] for runs in groups.values()])
        return [
            MethodRow(label=label, runs=tuple(runs), values=_summaries(runs))
            for label, runs in zip(labels, groups.values(), strict=True)
        ]

    def shared(self, subject: str) -> dict[Key, Summary]:
        """`original`, `retrained` or `floor` for each measurement.

        Methods with the same seeds of training and audit (the gold's) share these values, so each such pair counts
        once: repeating it for every method would make the interval narrower than the evidence. Within a pair the values
        are averaged.
        """
        found: dict[Key, Summary] = {}
        for key in self.keys():
            by_seed: dict[tuple[int | None, int | None], list[float]] = {}
            for run in self.results:
                value = next((getattr(row, subject) for row in _all(run) if row.key == key), None)
                if value is not None:
                    by_seed.setdefault((run.seeds.training, run.seeds.audit), []).append(value)
            summary = t_summary(sum(values) / len(values) for values in by_seed.values())
            if summary is not None:
                found[key] = summary
        return found


def t_summary(values: Iterable[float | None]) -> Summary | None:
    """Mean and 95% t-interval of the values that are there; None when none is."""
    numbers = [float(value) for value in values if value is not None and not math.isnan(value)]
    if not numbers:
        return None
    n = len(numbers)
    # Equal values keep their own digits: a mean that is off by a rounding would invent an interval of 1e-17.
    mean = numbers[0] if min(numbers) == max(numbers) else math.fsum(numbers) / n
    if n < 2 or not math.isfinite(mean):
        return Summary(mean=mean, low=None, high=None, n=n)
    from scipy.special import stdtrit

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in numbers) / (n - 1))
    half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
    return Summary(mean=mean, low=mean - half, high=mean + half, n=n)


def _all(run: Results) -> tuple[Measurement, ...]:
    return (*run.measurements, *run.attacks)


def _summaries(runs: Sequence[Results]) -> dict[Key, dict[str, Summary]]:
    collected: dict[Key, dict[str, list[float | None]]] = {}
    for run in runs:
        for row in _all(run):
            subjects = collected.setdefault(row.key, {})
            for subject in ("original", "unlearned", "retrained", "floor", "gap"):
                subjects.setdefault(subject, []).append(getattr(row, subject))
    return {
        key: {subject: summary for subject, values in subjects.items() if (summary := t_summary(values)) is not None}
        for key, subjects in collected.items()
    }


def _method_key(run: Results) -> tuple[str, bytes]:
    return run.method.name, canonical(plain(run.method.settings))


def _labels(runs: Sequence[Results]) -> list[str]:
    """The method's name; where a name comes with several settings, the settings that differ are told too."""
    labels = []
    for run in runs:
        same = [other.method.settings for other in runs if other.method.name == run.method.name]
        mine = run.method.settings
        differing = [key for key in sorted({k for s in same for k in s}) if len({repr(s.get(key)) for s in same}) > 1]
        told = ", ".join(f"{key}={mine.get(key)}" for key in differing)
        labels.append(f"{run.method.name} ({told})" if told else run.method.name)
    return labels
