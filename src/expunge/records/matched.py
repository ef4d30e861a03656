"""Methods side by side at one level of forgetting: what each has left when all have forgotten as much.

    matched(case, ["npo", ("grad_diff", {"lr": 1e-4})], "forget.probability", 0.1, also=("retain.probability",))

By `stop`, a method ends when it first reaches the level, and its model is measured. By `curve`, it runs to its end and the level is read
off its curve, between two looks by a straight line, at the `last` crossing or the `first`. The two can tell different stories: a method
that falls through the level and recovers its utility later looks poor at the first crossing and good at the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.cases.case import Case
from expunge.engine.measured import Curves
from expunge.errors import BadSetting
from expunge.methods.outcome import Outcome, unlearn
from expunge.parts.stops import reaches
from expunge.records.compare import MethodSpec, _spec

HOW = ("stop", "curve")
CROSSINGS = ("last", "first")


@dataclass(frozen=True)
class Matched:
    """A method at the level. step: updates (a fraction between two looks). values: name -> measurement there; the last ones where the
    level was never reached. outcome: of the run, whose model is at the level only by `stop`."""

    method: str
    settings: dict[str, Any]
    reached: bool
    step: float
    values: dict[str, float]
    outcome: Outcome


def matched(
    case: Case,
    methods: Iterable[MethodSpec],
    key: str,
    level: float,
    *,
    also: Sequence[str] = ("retain.utility",),
    how: str = "curve",
    crossing: str = "last",
    every: int = 1,
    seed: int = 0,
    floor: float | None = None,
) -> list[Matched]:
    """Every method where `key` (such as "forget.loss", "forget.probability") reaches `level`.

    also: what to measure there beside it. every: updates between two looks. Methods of one step have no curve and are refused.
    """
    if how not in HOW or crossing not in CROSSINGS:
        raise BadSetting(
            f"expected how in {HOW} and crossing in {CROSSINGS}, found {how!r} and {crossing!r}; correct them"
        )
    curves = Curves(every, tuple(dict.fromkeys((key, *also))))
    split, name = key.split(".")
    stop = reaches(level, name, split, every)
    found = []
    for which, settings in map(_spec, methods):
        outcome = unlearn(
            case, which, seed=seed, floor=floor, curves=curves, stop=stop if how == "stop" else None, **settings
        )
        curve = curve_of(outcome.record["history"])
        if len(curve) < 2:
            raise BadSetting(
                f"expected a method of many steps, found {which}, which left no curve; compare it on its own"
            )
        reached, step, values = at_level(curve, key, level, "first" if how == "stop" else crossing)
        if how == "stop" and reached:  # the model is where the run ended, not between two looks
            step, values = max(curve), curve[max(curve)]
        found.append(Matched(which, settings, reached, step, dict(values), outcome))
    return found


def curve_of(history: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """step -> measurements, of a run's history."""
    return {int(entry["step"]): dict(entry["measured"]) for entry in history if "measured" in entry}


def at_level(
    curve: Mapping[int, Mapping[str, float]], key: str, level: float, crossing: str = "last"
) -> tuple[bool, float, dict[str, float]]:
    """(reached, step, measurements) where `key` crosses a level, coming from the curve's start; by straight lines between looks.

    last: where it crosses for good (an end on the near side of the level is not reached). first: where it first crosses."""
    steps = sorted(curve)
    up = curve[steps[0]][key] <= level
    beyond = [(curve[s][key] >= level) if up else (curve[s][key] <= level) for s in steps]
    pairs = [i for i in range(1, len(steps)) if beyond[i] and not beyond[i - 1]]
    if beyond[0] and (crossing == "first" or all(beyond)):
        return True, float(steps[0]), dict(curve[steps[0]])
    if not pairs or (crossing == "last" and not beyond[-1]):
        return False, float(steps[-1]), dict(curve[steps[-1]])
    i = pairs[0] if crossing == "first" else pairs[-1]
    a, b = curve[steps[i - 1]], curve[steps[i]]
    share = (level - a[key]) / (b[key] - a[key])
    step = steps[i - 1] + share * (steps[i] - steps[i - 1])
    return True, step, {name: a[name] + share * (b[name] - a[name]) for name in b}
