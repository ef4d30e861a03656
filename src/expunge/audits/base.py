"""What a check is, what it measures, and the registry that lists them.

A check is a function `(subjects, **settings) -> list[Measurement]` under the decorator `@check(...)`, which says its
unit, direction, range and needs. The decorated name is a `Check`: calling it verifies the needs first, and `run_checks`
verifies the needs of all checks together, so that everything missing is told at once, before any model runs.

    @check("ua", unit="%", range=(0, 100), needs=("retrained",), kinds=("classification",), source="...")
    def ua(subjects):
        return [ua.measurement(subjects.proportion(...), split="forget")]

A new file in `metrics/` or `attacks/` is found by itself.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from expunge.errors import BadSetting, MissingGold, UnmetNeed, nearest

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

Direction = Literal["higher", "lower", "match"]
Range = tuple[float | None, float | None]
GOLD_NEEDS = ("retrained", "floor", "retrained_ensemble")
"""Needs whose absence is a `MissingGold`."""


@dataclass(frozen=True)
class Measured:
    """One number for each subject, before it is given a name and a unit.

    values: original, unlearned, retrained -> value; `floor` -> how far a second retrained seed lies from the first.
    intervals: subject -> 95% interval. per_example: subject -> one value for each example of the split, in its order.
    """

    values: Mapping[str, float | None]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    per_example: Mapping[str, list[float]] | None = None


@dataclass(frozen=True)
class Measurement:
    """One number of one check on one split, for all subjects together (the fields of `expunge.records.Measurement`).

    floor: distance between a second retrained seed and the first, in the same unit: a gap to `retrained` below it is
    noise.
    direction: `match` means that nearest to retrained is best. curves: subject -> {"fpr": [...], "tpr": [...]} or other
    named lists. per_example: subject -> list, in the order of the split.
    """

    check: str
    name: str
    version: str = "1"
    unit: str = ""
    direction: Direction = "match"
    range: Range = (None, None)
    split: str = ""
    original: float | None = None
    unlearned: float | None = None
    retrained: float | None = None
    floor: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    note: str = ""
    curves: Mapping[str, Any] | None = field(default=None, repr=False)
    per_example: Mapping[str, list[float]] | None = field(default=None, repr=False)

    @property
    def gap(self) -> float | None:
        """unlearned - retrained, signed, in the measurement's unit."""
        return None if self.unlearned is None or self.retrained is None else self.unlearned - self.retrained

    def as_dict(self, extras: bool = False) -> dict[str, Any]:
        """What results.json holds; `extras` adds `curves` and `per_example`, which the record keeps elsewhere."""
        names = [
            "check",
            "name",
            "version",
            "unit",
            "direction",
            "range",
            "split",
            "original",
            "unlearned",
            "retrained",
        ]
        found = {name: getattr(self, name) for name in [*names, "floor", "intervals", "note"]}
        found["range"] = list(self.range)
        found["intervals"] = {subject: list(pair) for subject, pair in self.intervals.items()}
        if extras:
            found |= {"curves": self.curves, "per_example": self.per_example}
        return found


@dataclass(frozen=True)
class Check:
    """A registered check. needs: names of `expunge.audits.subjects.NEEDS`; kinds: tasks it serves, () for all of them.

    attack: True when it tries to bring the forgotten back or to tell that it was there.
    """

    name: str
    function: Callable[..., list[Measurement]] = field(repr=False)
    version: str = "1"
    unit: str = ""
    direction: Direction = "match"
    range: Range = (None, None)
    needs: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    source: str = ""
    attack: bool = False

    @property
    def summary(self) -> str:
        """The first line of the check's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def settings(self) -> dict[str, Any]:
        """Setting -> default."""
        found = list(inspect.signature(self.function).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in found}

    def __call__(self, subjects: Subjects, **settings: Any) -> list[Measurement]:
        verify_needs([self], subjects)
        self.verify_settings(settings)
        return self.function(subjects, **settings)

    def verify_settings(self, settings: Mapping[str, Any]) -> None:
        known = self.settings
        for name in settings:
            if name not in known:
                raise BadSetting(
                    f"expected settings of the check '{self.name}' ({', '.join(known) or 'it has none'}), found "
                    f"'{name}'.{nearest(name, known)} Remove or rename it."
                )

    def measurement(self, measured: Measured, *, name: str = "", split: str = "", **changes: Any) -> Measurement:
        """A measurement with this check's name, version, unit, direction and range; `changes` replace any field.

        Intervals are cut to the range, so that an unbounded one (a single example) becomes the whole range.
        """
        fields: dict[str, Any] = {"unit": self.unit, "direction": self.direction, "range": self.range}
        fields |= {subject: measured.values.get(subject) for subject in ("original", "unlearned", "retrained", "floor")}
        fields |= {"intervals": measured.intervals, "per_example": measured.per_example} | changes
        fields["intervals"] = {subject: _cut(pair, fields["range"]) for subject, pair in fields["intervals"].items()}
        return Measurement(check=self.name, name=name or self.name, version=self.version, split=split, **fields)


_CHECKS: dict[str, Check] = {}
_loaded = False


def check(name: str, **facts: Any) -> Callable[[Callable[..., list[Measurement]]], Check]:
    """Register the function below as the check `name`; `facts` are the fields of `Check`."""

    def register(function: Callable[..., list[Measurement]]) -> Check:
        made = Check(name, function, **facts)
        earlier = _CHECKS.get(name)
        if earlier is not None and earlier.function.__module__ != function.__module__:
            raise BadSetting(
                f"expected a new name for a check, found '{name}', which {earlier.function.__module__} has; choose "
                "another"
            )
        _CHECKS[name] = made
        return made

    return register


def checks(kind: str | None = None, attack: bool | None = None) -> dict[str, Check]:
    """All checks by name; only those that serve the task `kind`, or only (non-)attacks, when asked."""
    _load()
    return {
        name: item
        for name, item in sorted(_CHECKS.items())
        if (kind is None or not item.kinds or kind in item.kinds) and attack in (None, item.attack)
    }


def find_check(which: str | Check) -> Check:
    """A check by name, or itself."""
    if isinstance(which, Check):
        return which
    known = checks()
    if which not in known:
        raise BadSetting(
            f"expected a check, one of {', '.join(known)}, found '{which}'.{nearest(which, known)} Use one of them."
        )
    return known[which]


def verify_needs(wanted: Iterable[Check], subjects: Subjects) -> None:
    """Raise one `UnmetNeed` (`MissingGold` where a gold is among them) listing everything the checks lack."""
    problems: dict[str, list[str]] = {}
    gold = False
    for item in wanted:
        if item.kinds and subjects.task.name not in item.kinds:
            text = (
                f"expected a task among {', '.join(item.kinds)}, found {subjects.task.name}; leave the check out "
                f"(checks(kind='{subjects.task.name}') lists those that serve it)"
            )
            problems.setdefault(text, []).append(item.name)
        for need in item.needs:
            text = subjects.unmet(need)
            if text:
                gold |= need in GOLD_NEEDS
                problems.setdefault(text, []).append(item.name)
    if problems:
        lines = [f"- {', '.join(names)}: {text}" for text, names in problems.items()]
        raise (MissingGold if gold else UnmetNeed)("the audit cannot start:\n" + "\n".join(lines))


def run_checks(
    subjects: Subjects,
    wanted: Iterable[str | Check],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[Check], None] | None = None,
) -> list[Measurement]:
    """All measurements of the wanted checks, in their order. `settings`: check name -> its settings.

    Needs and settings of all checks are verified before the first one runs. `progress` is called before each.
    """
    chosen = [find_check(item) for item in wanted]
    given = {name: dict(values) for name, values in (settings or {}).items()}
    names = [item.name for item in chosen]
    for name, values in given.items():
        if name not in names:
            raise BadSetting(
                f"expected settings for a wanted check ({', '.join(names)}), found '{name}'.{nearest(name, names)} "
                "Add the check or remove its settings."
            )
        find_check(name).verify_settings(values)
    verify_needs(chosen, subjects)
    found: list[Measurement] = []
    for item in chosen:
        if progress is not None:
            progress(item)
        found += item.function(subjects, **given.get(item.name, {}))
    return found


def _cut(pair: tuple[float, float], limits: Range) -> tuple[float, float]:
    low, high = (-math.inf if limits[0] is None else limits[0]), (math.inf if limits[1] is None else limits[1])
    return min(max(pair[0], low), high), max(min(pair[1], high), low)


def _load() -> None:
    """Import every module of metrics/ and attacks/, so that their checks register."""
    global _loaded
    if _loaded:
        return
    for room in ("expunge.audits.metrics", "expunge.audits.attacks"):
        for module in pkgutil.iter_modules(importlib.import_module(room).__path__):
            importlib.import_module(f"{room}.{module.name}")
    _loaded = True
