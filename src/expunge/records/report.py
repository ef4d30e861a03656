"""report.html: one page that says what happened, in plain words first, in numbers after. A view of results.json.

The page holds everything it shows: styles and pictures are inside, there is no script, nothing is fetched, and its
content policy forbids both. Text from outside is escaped. No example of the data is ever shown, nor are ids.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from expunge.files import write_atomic
from expunge.records import plots
from expunge.records.comparison import Comparison
from expunge.records.comparison_view import comparison_view
from expunge.records.limits import limits_of
from expunge.records.results import Measurement, Results
from expunge.records.svg import brief, show
from expunge.records.views import (
    badge,
    cell,
    facts,
    forget_row,
    grade,
    number_rows,
    residue,
    residue_base,
    safe_pairs,
    utility_row,
)

TITLES = {
    "kept": "What must stay, under the same noise", "forgotten": "What was to be forgotten, under the same noise",
    "attacked": "What was to be forgotten, after each attack", "asked": "What was to be forgotten, by each attack's prompts",
}  # fmt: skip


def render(results_or_comparison: Results | Comparison, pictures: Sequence[Mapping[str, str]] = ()) -> str:
    """The page as text: for one run, or for a comparison of several. pictures: title and data URI of each."""
    if isinstance(results_or_comparison, Comparison):
        return (
            templates()
            .get_template("comparison.html")
            .render(**comparison_view(results_or_comparison), pictures=pictures)
        )
    return templates().get_template("run.html").render(**run_view(results_or_comparison), pictures=pictures)


def write_report(path: str | os.PathLike[str], results_or_comparison: Results | Comparison) -> Path:
    """Write the page to `path` in one step (`DiskFull` leaves an older page as it was). PNG files in a folder `pictures` beside it
    (contact sheets of a generative model) are put into the page."""
    return write_atomic(path, render(results_or_comparison, pictures_beside(Path(path))))


def pictures_beside(path: Path) -> list[dict[str, str]]:
    """Title and data URI of each contact sheet."""
    return [
        {
            "title": TITLES.get(file.stem, file.stem),
            "uri": "data:image/png;base64," + b64encode(file.read_bytes()).decode(),
        }
        for file in sorted((path.parent / "pictures").glob("*.png"), key=_place)
    ]


def _place(file: Path) -> tuple[int, str]:
    """Known pictures in the order of their titles, then others by name."""
    return (list(TITLES).index(file.stem) if file.stem in TITLES else len(TITLES)), file.stem


def render_study(
    parts: Mapping[str, Comparison], title: str, subtitle: str = "",
    pictures: Mapping[str, Sequence[Mapping[str, str]]] | None = None,
) -> str:  # fmt: skip
    """Several comparisons (requests to one model) on one page. pictures: of each part."""
    from markupsafe import Markup

    body = templates().get_template("comparison_body.html")
    shown = []
    for number, (name, comparison) in enumerate(parts.items()):
        view = comparison_view(comparison) | {"pictures": (pictures or {}).get(name, ())}
        shown.append(
            {
                "anchor": f"part{number}",
                "title": f"{name}: {view['title']}",
                "counts": view["counts"],
                "body": Markup(body.render(**view)),  # already escaped by its own template
            }
        )
    return templates().get_template("study.html").render(title=title, subtitle=subtitle, parts=shown)


def write_study(path: str | os.PathLike[str], parts: Mapping[str, Comparison], title: str, subtitle: str = "") -> Path:
    """Write the page of several comparisons to `path` in one step; a part's `pictures` folder lies in a folder of its name."""
    beside = {name: pictures_beside(Path(path).parent / name.replace(" ", "-") / "report.html") for name in parts}
    return write_atomic(path, render_study(parts, title, subtitle, beside))


@cache
def templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    environment.filters["brief"] = brief
    return environment


def run_view(run: Results) -> dict[str, Any]:
    """Everything the template of one run shows."""
    base = residue_base(run)
    return {
        "title": f"{run.method.name} on {run.case.name}",
        "run": run,
        "badge": badge(run.verdict),
        "tiles": _tiles(run),
        "request": safe_pairs(run.case.request),
        "settings": safe_pairs(run.method.settings),
        "rows": [_row(row) for row in run.measurements],
        "attacks": [_attack(row, base) for row in run.attacks],
        "base": base,
        "base_residue": residue(base, base),
        "numbers": number_rows(run.verdict),
        "trade_off": _trade_off(run),
        "histograms": _histograms(run.plots.loss_histograms),
        "rocs": [plots.roc(attack, curves) for attack, curves in run.plots.roc.items()],
        "per_class": plots.per_class(run.plots.per_class),
        "curves": plots.training_curves(run),
        "subjects": [(name, plots.COLOURS[name], plots.DASHES[name]) for name in plots.COLOURS],
        "limits": limits_of(run),
        "facts": facts(run),
    }


def _row(row: Measurement) -> dict[str, Any]:
    words, style = grade(row.gap, row.floor, row.direction)
    return {
        "of": row,
        "cells": {name: cell(getattr(row, name), row.intervals.get(name)) for name in plots.COLOURS},
        "floor": cell(row.floor, None),
        "gap": show(row.gap, signed=True),
        "words": words,
        "style": style,
    }


def _attack(row: Measurement, base: Measurement | None) -> dict[str, Any]:
    """An attack's row: scores after it, and how much of what was to be forgotten came back."""
    return {**_row(row), "residue": residue(row, base)}


def _tiles(run: Results) -> list[dict[str, str]]:
    """The four numbers a hurried reader wants."""
    tiles = []
    for title, row in (("Forgetting", forget_row(run)), ("Usefulness", utility_row(run))):
        if row is not None:
            tiles.append(
                {
                    "title": title,
                    "value": f"{show(row.original)} \u2192 {show(row.unlearned)}",
                    "detail": f"{row.name} on {row.split or 'all'}; retrained has {show(row.retrained)}",
                }
            )
    base = residue_base(run)
    known = [(value, row) for row in run.attacks if (value := residue(row, base)) is not None]
    if known:
        worst, row = max(known, key=lambda pair: pair[0])
        detail = f"of what was forgotten came back by {row.check}, the strongest of {len(known)} attacks"
        tiles.append({"title": "Under attack", "value": f"{100 * worst:.0f} %", "detail": detail})
    elif run.attacks:
        tiles.append(
            {"title": "Under attack", "value": str(len(run.attacks)), "detail": "measurements, in the table below"}
        )
    relative, memory = run.cost.relative, run.cost.peak_memory_mb
    cost = f"{brief(run.cost.seconds)} s" if relative is None else f"{100 * relative:.3g} %"
    detail = (
        "retraining was not timed" if relative is None else f"of retraining\u2019s time: {brief(run.cost.seconds)} s"
    )
    tiles.append(
        {"title": "Cost", "value": cost, "detail": detail + (f"; {brief(memory)} MB at most" if memory else "")}
    )
    return tiles


def _trade_off(run: Results) -> plots.Figure:
    forget, utility = forget_row(run), utility_row(run)
    bubbles = []
    if forget is not None and utility is not None and forget.retrained is not None:
        for name in plots.COLOURS:
            score, use = getattr(forget, name), getattr(utility, name)
            if score is not None and use is not None:
                cost = {"unlearned": run.cost.relative, "retrained": 1.0 if run.cost.retrain_seconds else None}.get(
                    name
                )
                gap = abs(score - forget.retrained)
                bubbles.append(plots.Bubble(name, gap, use, cost, plots.COLOURS[name], reference=name != "unlearned"))
    names = [f"{row.name} ({row.split})" if row else "" for row in (forget, utility)]
    return plots.trade_off(bubbles, *names)


def _histograms(recorded: Mapping[str, Mapping[str, Iterable[float | None]]]) -> list[plots.Figure]:
    """The four splits that matter, each drawn or said to be missing; further splits after them."""
    wanted = ("forget", "retain", "holdout", "test")
    return [
        plots.loss_histograms(split, {name: list(values) for name, values in recorded.get(split, {}).items()})
        for split in (*wanted, *(split for split in recorded if split not in wanted))
    ]
