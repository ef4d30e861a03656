"""What numbers look like to a reader: cells, grades of a gap, the badge of a verdict. Shared by both reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from expunge.records.results import Interval, Measurement, Results, VerdictRecord
from expunge.records.svg import show

_FORGET = ("forget_score", "forget_score_forget", "ua", "probability_forget", "forget_accuracy", "accuracy")
_UTILITY = ("ta", "utility_test", "utility", "utility_retain", "probability_retain", "model_utility", "accuracy", "r2")


@dataclass(frozen=True)
class Badge:
    """A verdict for people: its word, a sentence in plain words, the reason, a style, a mark (not colour alone)."""

    word: str
    plain: str
    reason: str
    style: str
    mark: str


_VERDICTS = (  # the longer word first: "removed (proved)" begins with "removed"
    (
        "removed (proved)",
        "It is gone, and this is proved: the weights equal those of a clean retraining.",
        "good",
        "\u2713",
    ),
    ("removed (bounded)", "It is gone up to a stated bound: what may remain is limited by a proof.", "good", "\u2713"),
    ("removed", "It is gone, as far as it was tested: no attack in the battery brought it back.", "good", "\u2713"),
    ("suppressed", "It is hidden, not gone: an attack brought it back.", "warn", "!"),
    ("retained", "It is still there: the model shows what it should have forgotten.", "bad", "\u2717"),
    (
        "over-forgotten",
        "It went too far: the forgotten data stands out by being unusually wrong, and that too gives it away.",
        "odd",
        "\u2193",
    ),
    (
        "collapsed",
        "The model broke: it lost too much of its usefulness for forgetting to mean anything.",
        "bad",
        "\u2717",
    ),
    (
        "undetectable",
        "There was nothing measurable to forget: the original barely knew this data better.",
        "calm",
        "\u2205",
    ),
    ("inconclusive", "The measurements are too uncertain to decide.", "calm", "?"),
)


def badge(verdict: VerdictRecord | None) -> Badge:
    """The verdict in plain words."""
    if verdict is None:
        return Badge("not judged", "No verdict was made for this run.", "", "calm", "?")
    word = verdict.verdict.replace("_", "-").lower()
    for name, sentence, style, mark in _VERDICTS:
        if word.startswith(name):
            return Badge(verdict.verdict, sentence, verdict.reason, style, mark)
    return Badge(verdict.verdict, "", verdict.reason, "calm", "?")


def cell(value: float | None, interval: Interval | None) -> dict[str, str]:
    """A number, its exact digits for the tooltip, and its 95% interval as text."""
    around = f"{show(interval[0])} to {show(interval[1])}" if interval is not None and None not in interval else ""
    return {"text": show(value), "exact": "" if value is None else repr(value), "interval": around}


def grade(gap: float | None, floor: float | None, direction: str) -> tuple[str, str]:
    """(words, style) for the size of a gap in noise floors; style: better, g0 (within noise) .. g3, none."""
    if gap is None or math.isnan(gap):
        return "no reference", "none"
    if floor is None or math.isnan(floor):
        return "no floor", "none"
    size, noise = abs(gap), abs(floor)
    if size <= noise:
        return "within noise", "g0"
    better = (direction == "higher" and gap > 0) or (direction == "lower" and gap < 0)
    if noise == 0:
        return ("better" if better else "floor is 0"), ("better" if better else "g3")
    words = f"{size / noise:.1f} \u00d7 floor" if size / noise < 100 else "over 100 \u00d7 floor"
    if better:
        return f"better, {words}", "better"
    return words, "g1" if size <= 2 * noise else "g2" if size <= 4 * noise else "g3"


def forget_row(run: Results) -> Measurement | None:
    """The measurement that says how well the forget data is still known."""
    return _pick(run.measurements, _FORGET, ("forget",))


def utility_row(run: Results) -> Measurement | None:
    """The measurement that says how useful the model is; of a generative model what judges say of its other images."""
    judged = next((row for row in run.measurements if (row.check, row.name) == ("generation_accuracy", "ra")), None)
    return judged or _pick(run.measurements, _UTILITY, ("test", "retain", ""), higher=True)


def _pick(
    rows: Iterable[Measurement], names: tuple[str, ...], splits: tuple[str, ...], higher: bool = False
) -> Measurement | None:
    usable = [row for row in rows if row.unlearned is not None and row.retrained is not None]
    for split in splits:
        here = [row for row in usable if row.split == split]
        named = sorted((row for row in here if row.name in names), key=lambda row: names.index(row.name))
        rest = [row for row in here if row.direction == "higher" or not higher]
        if named or rest:
            return (named or rest)[0]
    return None


def residue_base(run: Results) -> Measurement | None:
    """The task's forget score before any attack: m(.) of the verdict, for original, unlearned and retrained."""
    row = next((row for row in run.measurements if _is_score(row) and row.split == "forget"), None)
    return row if row is not None and None not in (row.original, row.unlearned, row.retrained) else None


def residue(row: Measurement | None, base: Measurement | None) -> float | None:
    """(m(a(U)) - m(a(R))) / (m(O) - m(R)): 1 means all of it is there, 0 means as after retraining.

    None where the row is not the forget score, or where original and retrained know the data equally well.
    """
    if row is None or base is None or not _is_score(row) or None in (row.unlearned, row.retrained):
        return None
    span = base.original - base.retrained  # type: ignore[operator]
    return None if span == 0 else (row.unlearned - row.retrained) / span  # type: ignore[operator]


def _is_score(row: Measurement) -> bool:
    """True for the task's forget score, as the audits spell it: by the check's name, or in the measurement's; a language
    model's is the length-normalised probability."""
    return row.check == "forget_score" or row.name.startswith("forget_score") or row.name == "probability_forget"


def number_rows(verdict: VerdictRecord | None) -> list[tuple[str, str]]:
    """The verdict's numbers and thresholds, nested names joined by dots."""
    if verdict is None:
        return []
    thresholds = [(f"threshold: {name}", value) for name, value in _flat(verdict.thresholds)]
    return [(name, value) for name, value in (*_flat(verdict.numbers), *thresholds)]


def safe_pairs(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of a description; lists are told by their length only (they may be ids)."""
    return _flat(described)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            pairs.extend(_flat(value, f"{prefix}{name}."))
        elif isinstance(value, list | tuple):
            short = len(value) <= 3 and all(isinstance(item, float) for item in value)
            text = ", ".join(show(item) for item in value) if short else f"{len(value)} values"
            pairs.append((f"{prefix}{name}", text))
        elif isinstance(value, bool) or not isinstance(value, float):
            pairs.append((f"{prefix}{name}", str(value)))
        else:
            pairs.append((f"{prefix}{name}", show(value)))
    return pairs


def facts(run: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """What it takes to make this again: groups of name and value."""
    weights = [(name, value) for name, value in run.weights.model_dump().items() if value]
    data = [("fingerprint", run.case.data.fingerprint), ("rows", str(run.case.data.rows))]
    splits = [(f"examples in {name}", str(size)) for name, size in run.case.splits.items()]
    seeds = [(name, str(value)) for name, value in run.seeds.model_dump().items() if value is not None]
    return [
        (title, pairs)
        for title, pairs in (
            ("Seeds", seeds),
            ("Versions", sorted(run.versions.items())),
            ("Machine", safe_pairs(run.machine)),
            ("Data", [*data, *splits]),
            ("Weights (SHA-256)", weights),
        )
        if pairs
    ]
