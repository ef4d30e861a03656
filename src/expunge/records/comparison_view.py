"""What the comparison's page shows: methods in an overview, every measurement in one table, pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from expunge.records import plots
from expunge.records.comparison import Comparison, Key, MethodRow, Summary, t_summary
from expunge.records.limits import limits_of
from expunge.records.results import Curve, Measurement, Results
from expunge.records.svg import brief, show
from expunge.records.views import (
    badge,
    facts,
    forget_row,
    grade,
    number_rows,
    residue,
    residue_base,
    safe_pairs,
    utility_row,
)


def comparison_view(comparison: Comparison) -> dict[str, Any]:
    """Everything the template of a comparison shows."""
    rows, first = comparison.rows(), comparison.results[0]
    colours = {row.label: plots.OTHERS[i % len(plots.OTHERS)] for i, row in enumerate(rows)}
    seeds = max(len(row.runs) for row in rows)
    return {
        "title": f"{len(rows)} method{'s' if len(rows) != 1 else ''} on {first.case.name}",
        "comparison": comparison,
        "first": first,
        "seeds": seeds,
        "request": safe_pairs(first.case.request),
        "methods": [_method(row, colours[row.label]) for row in rows],
        "references": _references(comparison),
        "counts": _verdict_counts(rows),
        "measured": _table(comparison, rows, [row.key for run in comparison.results for row in run.measurements]),
        "attacks": _table(comparison, rows, [row.key for run in comparison.results for row in run.attacks]),
        "trade_off": _trade_off(comparison, rows, colours),
        "histograms": _histograms(rows),
        "rocs": _rocs(rows, colours),
        "subjects": [(name, plots.COLOURS[name], plots.DASHES[name]) for name in plots.COLOURS],
        "limits": list(dict.fromkeys(line for run in comparison.results for line in limits_of(run))),
        "facts": facts(first),
        "warnings": [
            (row.label, text) for row in rows for text in dict.fromkeys(w for r in row.runs for w in r.warnings)
        ],
    }


def _method(row: MethodRow, colour: str) -> dict[str, Any]:
    """A method's line in the overview, and its details."""
    first = row.runs[0]
    graded = [grade(m.gap, m.floor, m.direction)[1] for run in row.runs for m in run.measurements]
    judged = [style for style in graded if style != "none"]
    worst = t_summary(_worst_residue(run) for run in row.runs)
    return {
        "label": row.label,
        "colour": colour,
        "method": first.method,
        "seeds": len(row.runs),
        "badges": [(_badge_of(row, word), count) for word, count in row.verdicts.items()]
        or [(badge(None), len(row.runs))],
        "within": f"{100 * sum(s in ('g0', 'better') for s in judged) / len(judged):.0f} %" if judged else "\u2013",
        "worst": _pair(worst),
        "forget": _pair(_over(row, forget_row)),
        "utility": _pair(_over(row, utility_row)),
        "seconds": _pair(row.cost("seconds"), brief),
        "relative": _pair(row.cost("relative"), brief),
        "memory": _pair(row.cost("peak_memory_mb"), brief),
        "settings": safe_pairs(first.method.settings),
        "numbers": number_rows(first.verdict),
        "seed_list": [
            ", ".join(f"{k} {v}" for k, v in run.seeds.model_dump().items() if v is not None) for run in row.runs
        ],
        "curves": plots.training_curves(first),
        "per_class": plots.per_class(first.plots.per_class),
    }


def _references(comparison: Comparison) -> list[dict[str, Any]]:
    """Original and retrained, as lines of the overview."""
    forget, utility = forget_row(comparison.results[0]), utility_row(comparison.results[0])
    time = t_summary(run.cost.retrain_seconds for run in comparison.results)
    lines = []
    for name in ("original", "retrained"):
        shared = comparison.shared(name)
        lines.append(
            {
                "label": name,
                "colour": plots.COLOURS[name],
                "forget": _pair(shared.get(forget.key) if forget else None),
                "utility": _pair(shared.get(utility.key) if utility else None),
                "worst": {"original": "1", "retrained": "0"}[name],
                "seconds": _pair(time if name == "retrained" else None, brief),
                "relative": "1" if name == "retrained" and time else show(None),
            }
        )
    return lines


def _badge_of(row: MethodRow, word: str) -> Any:
    return badge(next(run.verdict for run in row.runs if run.verdict is not None and run.verdict.verdict == word))


def _worst_residue(run: Results) -> float | None:
    base = residue_base(run)
    known = [value for row in run.attacks if (value := residue(row, base)) is not None]
    return max(known) if known else None


def _over(row: MethodRow, pick: Any) -> Summary | None:
    chosen = pick(row.runs[0])
    return None if chosen is None else row.values[chosen.key].get("unlearned")


def _pair(summary: Summary | None, write: Callable[[float | None], str] = show) -> dict[str, str]:
    """Mean and half-width as text."""
    if summary is None:
        return {"text": show(None), "half": "", "exact": ""}
    width = None if summary.high is None else summary.high - summary.mean
    half = "" if width is None else "\u00b1 0" if width == 0 else f"\u00b1 {write(width)}"
    return {"text": write(summary.mean), "half": half, "exact": repr(summary.mean)}


def _table(comparison: Comparison, rows: list[MethodRow], keys: list[Key]) -> list[dict[str, Any]]:
    """One line for each measurement: original, every method (value, gap, grade), retrained, floor."""
    shared = {subject: comparison.shared(subject) for subject in ("original", "retrained", "floor")}
    return [
        {
            "of": (measurement := comparison.measurement(key)),
            **{subject: _pair(values.get(key)) for subject, values in shared.items()},
            "cells": [_method_cell(row, key, measurement) for row in rows],
        }
        for key in dict.fromkeys(keys)
    ]


def _method_cell(row: MethodRow, key: Key, measurement: Measurement) -> dict[str, str]:
    """Value, gap and grade; where it is an attack on the forget score, the residue in place of the gap."""
    values = row.values.get(key, {})
    gap, floor = values.get("gap"), values.get("floor")
    words, style = grade(gap.mean if gap else None, floor.mean if floor else None, measurement.direction)
    below = f"gap {show(gap.mean if gap else None, signed=True)}"
    attacks = [(next((m for m in run.attacks if m.key == key), None), residue_base(run)) for run in row.runs]
    left = t_summary(residue(attack, base) for attack, base in attacks)
    if left is not None:
        below = f"res. {show(left.mean)}"
    return {**_pair(values.get("unlearned")), "gap": below, "words": words, "style": style}


def _verdict_counts(rows: list[MethodRow]) -> list[tuple[Any, list[str]]]:
    """Badge -> the methods whose most frequent verdict it is."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for row in rows:
        word = next(iter(row.verdicts), None)
        mark = badge(None) if word is None else _badge_of(row, word)
        found.setdefault(mark.word, (mark, []))[1].append(row.label)
    return list(found.values())


def _trade_off(comparison: Comparison, rows: list[MethodRow], colours: dict[str, str]) -> plots.Figure:
    """Mean gap over seeds of |unlearned - retrained|, against utility, with the references."""
    forget, utility = forget_row(comparison.results[0]), utility_row(comparison.results[0])
    if forget is None or utility is None:
        return plots.trade_off([], "", "")
    bubbles = []
    for row in rows:
        gap = t_summary(abs(m.gap) if m and m.gap is not None else None for m in _each(row, forget.key))
        use = row.values.get(utility.key, {}).get("unlearned")
        if gap is not None and use is not None:
            cost, label = row.cost("relative"), row.label
            bubbles.append(
                plots.Bubble(
                    label, gap.mean, use.mean, cost.mean if cost else None, colours[label], _half(gap), _half(use)
                )
            )
    known, gold = (comparison.shared(subject).get(forget.key) for subject in ("original", "retrained"))
    for name, score, share in (("original", known, None), ("retrained", gold, 1.0)):
        use = comparison.shared(name).get(utility.key)
        if score is not None and gold is not None and use is not None:
            gap_to_gold, colour = abs(score.mean - gold.mean), plots.COLOURS[name]
            bubbles.append(plots.Bubble(name, gap_to_gold, use.mean, share, colour, reference=True))
    return plots.trade_off(bubbles, f"{forget.name} ({forget.split})", f"{utility.name} ({utility.split or 'all'})")


def _half(summary: Summary) -> float:
    """Half the interval's width; 0 where there is no interval."""
    return 0.0 if summary.high is None else summary.high - summary.mean


def _each(row: MethodRow, key: Key) -> list[Measurement | None]:
    return [next((m for m in run.measurements if m.key == key), None) for run in row.runs]


def _histograms(rows: list[MethodRow]) -> list[plots.Figure]:
    """The forget split's losses under each method (its first seed), always beside original and retrained."""
    drawn = []
    for row in rows:
        recorded = row.runs[0].plots.loss_histograms.get("forget", {})
        drawn.append(
            plots.loss_histograms(
                "forget", {name: list(v) for name, v in recorded.items()}, title=row.label, size=(372, 230)
            )
        )
    return drawn


def _rocs(rows: list[MethodRow], colours: dict[str, str]) -> list[plots.Figure]:
    """One picture for each attack: original and retrained once, each method's unlearned model (first seeds)."""
    gathered: dict[str, dict[str, Curve]] = {}
    for row in rows:
        for attack, curves in row.runs[0].plots.roc.items():
            here = gathered.setdefault(attack, {})
            for subject, curve in curves.items():
                here.setdefault(row.label if subject == "unlearned" else subject, curve)
    first = ("original", "retrained")
    return [
        plots.roc(attack, dict(sorted(curves.items(), key=lambda pair: pair[0] not in first)), colours, (520, 360))
        for attack, curves in gathered.items()
    ]
