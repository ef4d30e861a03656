"""The report's figures, drawn from results["plots"] (schema: head of results.py). A figure without data says why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from expunge.records.results import SUBJECTS, Curve, Results
from expunge.records.svg import Chart, grouped, show

COLOURS = {"original": "#6b7280", "unlearned": "#1d5fbf", "retrained": "#c2570c"}
DASHES = {"original": "5 4", "unlearned": "", "retrained": ""}
SPLITS = {"forget": "#b3261e", "retain": "#1d5fbf", "holdout": "#c2570c", "test": "#5b7f2b", "train": "#6b7280"}
OTHERS = ("#1d5fbf", "#b3261e", "#5b7f2b", "#7b3fa0", "#00798c", "#a8871b", "#d1495b", "#3d5a80", "#6a994e", "#8d5524")


@dataclass(frozen=True)
class Figure:
    """A picture with its title and caption; where `svg` is None, `caption` says why there is no picture."""

    title: str
    svg: Markup | None
    caption: str = ""
    legend: tuple[tuple[str, str, str], ...] = ()
    """(name, colour, dash)"""


@dataclass(frozen=True)
class Bubble:
    """One model in the trade-off: gap and utility with half-widths of their intervals, cost relative to retraining."""

    label: str
    gap: float
    utility: float
    cost: float | None
    colour: str
    gap_half: float = 0.0
    utility_half: float = 0.0
    reference: bool = False


def trade_off(bubbles: Sequence[Bubble], gap_name: str, utility_name: str) -> Figure:
    """Forgetting gap against utility; the area of a bubble is its cost. The best corner is top left."""
    title = "Forgetting, usefulness and cost"
    bubbles = [b for b in bubbles if math.isfinite(b.gap) and math.isfinite(b.utility)]
    if not bubbles:
        return Figure(
            title, None, "Left out: it needs a forget measurement and a utility, each with retrained beside it."
        )
    x_high = _calm_limit([b.gap + b.gap_half for b in bubbles])
    low, high = _calm_range([b.utility for b in bubbles])
    chart = Chart(
        (760, 430),
        (-0.03 * x_high, x_high),
        (low, high),
        f"forgetting gap to retrained: {gap_name} (nearer to 0 is better)",
        f"{utility_name} (higher is better)",
        f"{len(bubbles)} models by forgetting gap and utility",
    )
    reference = next((b for b in bubbles if b.label == "retrained"), None)
    if reference is not None:
        chart.rule(COLOURS["retrained"], y=reference.utility)
    front = _front([b for b in bubbles if not b.reference])
    if len(front) > 1:
        chart.line([(b.gap, b.utility) for b in front], "#9aa5b1", dash="2 3", width=1.4)
    outside = []
    sizes = {b.label: 5.0 if b.cost is None else min(3.5 + 16 * math.sqrt(max(b.cost, 0)), 26) for b in bubbles}
    for b in sorted(bubbles, key=lambda b: -sizes[b.label]):
        inside = low <= b.utility <= high and b.gap <= x_high
        if inside and b.gap_half:
            chart.line(
                [(max(b.gap - b.gap_half, 0), b.utility), (b.gap + b.gap_half, b.utility)],
                b.colour,
                width=1.2,
                opacity=0.4,
            )
        if inside and b.utility_half:
            chart.line(
                [(b.gap, b.utility - b.utility_half), (b.gap, b.utility + b.utility_half)],
                b.colour,
                width=1.2,
                opacity=0.4,
            )
        told = f"{b.label}: gap {show(b.gap)}, {utility_name} {show(b.utility)}, cost {show(b.cost)} of retraining"
        chart.dot(b.gap, b.utility, sizes[b.label], b.colour, told, hollow=b.reference)
        if not inside:
            outside.append(b.label)
    for b in sorted(bubbles, key=lambda b: sizes[b.label]):
        far = ""
        if b.label in outside:
            far = f" \u2192 gap {show(b.gap)}" if b.gap > x_high else ""
            arrow = "\u2193" if b.utility < low else "\u2191"
            far += "" if low <= b.utility <= high else f" {arrow} {show(b.utility)}"
        chart.name(b.gap, b.utility, sizes[b.label], b.label + far, bold=b.reference)
    caption = "The best corner is top left. A bubble's area grows with time relative to retraining; hollow: reference."
    if len(front) > 1:
        caption += " The dotted line joins the methods that no other beats on both axes."
    if any(b.gap_half or b.utility_half for b in bubbles):
        caption += " Crosses: 95% intervals over seeds."
    if outside:
        caption += f" Drawn at the edge, with their numbers, because they lie far outside: {', '.join(outside)}."
    return Figure(title, chart.markup(), caption)


def loss_histograms(
    split: str, subjects: Mapping[str, Sequence[float | None]], title: str = "", size: tuple[int, int] = (520, 240)
) -> Figure:
    """How the losses of one split's examples lie under each subject: shares over common bins."""
    title = title or f"Losses on {split}"
    clean = {
        name: [v for v in values if v is not None and math.isfinite(v)] for name, values in subjects.items() if values
    }
    clean = {name: values for name, values in clean.items() if values}
    if not clean:
        return Figure(title, None, f"Left out: no per-example losses were recorded on {split}.")
    everything = sorted(v for values in clean.values() for v in values)
    low, high = _quantile(everything, 0.005), _quantile(everything, 0.995)
    log = everything[0] >= 0 and high > 30 * max(_quantile(everything, 0.1), 1e-12)
    low = max(low, high * 1e-6, 1e-8) if log else low
    if high <= low:
        low, high = (low / 2, low * 2) if log and low > 0 else (low - 0.5, high + 0.5)
    reach = (lambda v: math.log10(max(v, 1e-12))) if log else float
    back = (lambda v: 10.0**v) if log else float
    bins = min(28, max(8, round(math.sqrt(min(map(len, clean.values())) * 2))))
    edges = [back(reach(low) + (reach(high) - reach(low)) * i / bins) for i in range(bins + 1)]
    shares = {name: grouped(values, reach, edges) for name, values in clean.items()}
    top = max(max(share) for share in shares.values()) * 1.08
    chart = Chart(
        size,
        (edges[0], edges[-1]),
        (0, top),
        "loss per example" + (" (log scale)" if log else ""),
        "share of examples",
        f"histogram of losses on {split}",
        log_x=log,
    )
    for name in [*[s for s in SUBJECTS if s in shares], *[s for s in shares if s not in SUBJECTS]]:
        steps = [(edge, share) for i, share in enumerate(shares[name]) for edge in (edges[i], edges[i + 1])]
        if name != "original":
            chart.area(steps, COLOURS.get(name, OTHERS[0]))
        chart.line(steps, COLOURS.get(name, OTHERS[0]), DASHES.get(name, ""), 1.8)
    counts = {len(values) for values in clean.values()}
    return Figure(title, chart.markup(), f"{min(counts)} examples; the outermost bins hold everything beyond them.")


def roc(
    attack: str,
    curves: Mapping[str, Curve],
    colours: Mapping[str, str] | None = None,
    size: tuple[int, int] = (372, 300),
) -> Figure:
    """Receiver operating curves of one attack; the diagonal is guessing."""
    colours = {**COLOURS, **(colours or {})}
    usable = {name: curve for name, curve in curves.items() if len(curve.fpr) > 1}
    if not usable:
        return Figure(attack, None, f"Left out: no curve was recorded for {attack}.")
    chart = Chart(
        size, (0, 1), (0, 1), "false positive rate", "true positive rate", f"ROC curves of the attack {attack}"
    )
    chart.line([(0, 0), (1, 1)], "#9aa5b1", "3 4", 1.2)
    legend = []
    for name, curve in usable.items():
        colour, dash = colours.get(name, OTHERS[0]), DASHES.get(name, "")
        chart.line(_thin(list(zip(curve.fpr, curve.tpr, strict=True))), colour, dash, 1.9)
        legend.append((f"{name} {show(area_under(curve))}", colour, dash))
    return Figure(attack, chart.markup(), "Area under the curve beside each name; 0.5 is guessing.", tuple(legend))


def per_class(subjects: Mapping[str, Sequence[float | None]], most: int = 30) -> Figure:
    """Accuracy of each class under each subject."""
    title = "Accuracy by class"
    names = [name for name in SUBJECTS if subjects.get(name)]
    if not names:
        return Figure(
            title,
            None,
            "Left out: no per-class accuracies were recorded (the task has no classes, or the audit no such check).",
        )
    count = max(len(subjects[name]) for name in names)
    classes = list(range(count))
    caption = "Bars that differ from retrained show what else moved."
    if count > most:
        classes = sorted(sorted(classes, key=lambda c: -_difference(subjects, c))[:most])
        caption = f"The {most} of {count} classes where unlearned and retrained differ most."
    chart = Chart(
        (520, 250),
        (-0.6, len(classes) - 0.4),
        (0, 1),
        "class",
        "accuracy",
        "accuracy by class",
        x_names=[str(c) for c in classes],
    )
    width = 0.78 / len(names)
    for place, c in enumerate(classes):
        for i, name in enumerate(names):
            value = subjects[name][c] if c < len(subjects[name]) else None
            if value is not None and math.isfinite(value):
                chart.bar(place - 0.39 + i * width, width, value, COLOURS[name], f"class {c}, {name}: {show(value)}")
    return Figure(title, chart.markup(), caption, tuple((name, COLOURS[name], "") for name in names))


def training_curves(run: Results) -> Figure:
    """What was measured while the method ran, over its steps."""
    title = "While it ran"
    rows = [dict(row) for row in run.plots.curves] or [{**row, **_losses(row)} for row in run.history]
    rows = [row for row in rows if _number(row.get("step", row.get("epoch"))) is not None]
    names = [
        n for n in dict.fromkeys(k for row in rows for k in row) if n not in ("step", "epoch", "phase", "seconds", "lr")
    ]
    series = {}
    for name in names:
        points = [(_number(row.get("step", row.get("epoch"))), _number(row.get(name))) for row in rows]
        known = [(x, y) for x, y in points if x is not None and y is not None]
        if len(known) > 1:
            series[name] = known
    if not series:
        return Figure(
            title,
            None,
            "Left out: fewer than two points were recorded while the method ran (one-shot edits have none).",
        )
    order = sorted(series, key=lambda n: (n not in SPLITS, names.index(n)))[:6]
    xs = [x for name in order for x, _ in series[name]]
    ys = [y for name in order for _, y in series[name] if math.isfinite(y)] or [0.0]
    low, high = min(0.0, min(ys)), max(ys)
    chart = Chart(
        (520, 250),
        (min(xs), max(xs)),
        (low, high + (high - low) * 0.06),
        "step",
        "loss",
        "values recorded over the steps",
    )
    legend = []
    for i, name in enumerate(order):
        colour = SPLITS.get(name, OTHERS[i % len(OTHERS)])
        chart.line(_thin(series[name]), colour, "", 1.9)
        legend.append((name, colour, ""))
    left_out = [name for name in series if name not in order]
    caption = f"Not drawn: {', '.join(left_out)}." if left_out else ""
    return Figure(title, chart.markup(), caption, tuple(legend))


def area_under(curve: Curve) -> float:
    """Area under a curve by trapezoids."""
    points = sorted(zip(curve.fpr, curve.tpr, strict=True))
    return math.fsum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(points, points[1:], strict=False))


def _front(bubbles: Sequence[Bubble]) -> list[Bubble]:
    """Those that no other beats on both gap (lower) and utility (higher), by rising gap."""
    front: list[Bubble] = []
    for bubble in sorted(bubbles, key=lambda b: (b.gap, -b.utility)):
        if not front or bubble.utility > front[-1].utility:
            front.append(bubble)
    return front


def _calm_range(values: Sequence[float]) -> tuple[float, float]:
    """A range that a few broken models cannot stretch: within six median deviations of the median."""
    middle = statistics.median(values)
    deviation = max(statistics.median(abs(v - middle) for v in values), 0.005 * abs(middle), 1e-9)
    inside = [v for v in values if abs(v - middle) <= 6 * deviation]
    room = max(max(inside) - min(inside), deviation) * 0.15
    return min(inside) - room, max(inside) + room


def _calm_limit(values: Sequence[float]) -> float:
    """Upper end of an axis from zero: the largest value, unless it is over four times the third quartile."""
    ordered = sorted(values)
    quartile = _quantile(ordered, 0.75)
    inside = [v for v in ordered if quartile == 0 or v <= 4 * quartile]
    return (max(inside) or 1.0) * 1.12


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _thin(points: list[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most that many points, ends kept, so that the file stays small."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _losses(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found = row.get("losses")
    return found if isinstance(found, Mapping) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _difference(subjects: Mapping[str, Sequence[float | None]], c: int) -> float:
    pair = [subjects[n][c] if c < len(subjects.get(n, ())) else None for n in ("unlearned", "retrained")]
    return 0.0 if None in pair else abs(pair[0] - pair[1])  # type: ignore[operator]
