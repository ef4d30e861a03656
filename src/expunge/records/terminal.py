"""Results as tables for a terminal (rich)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from expunge.records.comparison import Comparison, Summary
from expunge.records.results import Results
from expunge.records.svg import show

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = (
    ("ua", "forget", "UA %"), ("ra", "retain", "RA %"), ("ta", "test", "TA %"), ("mia_efficacy", "forget", "MIA-eff."),
    ("average_gap", "", "avg gap"), ("js_divergence", "forget", "JS"), ("error", "test", "error kept"),
    ("error", "forget", "error forgotten"), ("wasserstein", "forget", "W1"), ("membership", "forget", "AUC"),
    ("probability_forget", "forget", "P forget"), ("probability_retain", "retain", "P retain"),
    ("exact_memorisation_forget", "forget", "EM forget"), ("exact_memorisation_retain", "retain", "EM retain"),
    ("rouge_l_recall_forget", "forget", "ROUGE forget"), ("truth_ratio_forget", "forget", "truth ratio"),
    ("forget_quality", "forget", "FQ log10 p"), ("model_utility", "retain", "utility"), ("verbmem", "forget", "VerbMem"),
    ("knowmem_forget", "forget", "KnowMem f"), ("knowmem_retain", "retain", "KnowMem r"), ("privleak", "", "PrivLeak"),
    ("relearning: forget_score", "forget", "relearned"),
)  # fmt: skip
"""Columns of a comparison, as far as its results have them: name (or check: name), split, heading."""

COLOURS = {"good": "green", "warn": "yellow", "bad": "red", "odd": "magenta", "calm": "cyan"}


def results_table(results: Results) -> Table:
    """Every measurement and attack: original, unlearned, retrained, floor, gap."""
    from rich.table import Table

    table = Table(title=f"{results.method.name} on {results.case.name}", title_justify="left")
    for heading in ("measurement", "split"):
        table.add_column(heading)
    for heading in ("original", "unlearned", "retrained", "floor", "gap"):
        table.add_column(heading, justify="right")
    for group in (results.measurements, results.attacks):
        for row in group:
            name = row.name if row.name.startswith(row.check) or row.check in row.name else f"{row.check}: {row.name}"
            style = "bold" if row.gap is not None and row.floor is not None and abs(row.gap) > row.floor else None
            table.add_row(
                name, row.split, show(row.original), show(row.unlearned), show(row.retrained), show(row.floor),
                show(row.gap, signed=True), style=style,
            )  # fmt: skip
        table.add_section()
    return table


def comparison_table(comparison: Comparison) -> Table:
    """One line per method, `original` and `retrained` beside them; means over seeds with 95% t-intervals."""
    from rich.table import Table

    rows = comparison.rows()
    keys = comparison.keys()
    columns = []
    for name, split, heading in SHOWN:
        key = next((k for k in keys if name in (k[1], f"{k[0]}: {k[1]}") and (not split or k[2] == split)), None)
        if key is not None:
            columns.append((key, heading))
    seeds = max(len(r.runs) for r in rows)
    table = Table(
        title=f"{comparison.results[0].case.name}, {seeds} seed{'s' if seeds != 1 else ''}", title_justify="left"
    )
    table.add_column("model")
    for _, heading in columns:
        table.add_column(heading, justify="right")
    costs = [row.cost("relative") for row in rows]
    timed = any(cost is not None for cost in costs)  # retraining's time is unknown where the retrained model was given
    if timed:
        table.add_column("cost", justify="right")
    table.add_column("verdict")
    for subject in ("original", "retrained"):
        shared = comparison.shared(subject)
        one = ["1" if subject == "retrained" else ""] if timed else []
        table.add_row(subject, *[_cell(shared.get(key)) for key, _ in columns], *one, "", style="dim")
    table.add_section()
    for row, cost in zip(rows, costs, strict=True):
        verdicts = ", ".join(
            f"{w}{'' if n == len(row.runs) else f' {n}/{len(row.runs)}'}" for w, n in row.verdicts.items()
        )
        values = [_cell(row.values.get(key, {}).get("unlearned")) for key, _ in columns]
        one = ["" if cost is None else f"{cost.mean:.3f}"] if timed else []
        table.add_row(row.label, *values, *one, _coloured(verdicts))
    return table


def as_text(table: Table, *lines: str, width: int = 140) -> str:
    """A table as plain text."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    console.print(table)
    for line in lines:
        console.print(line)
    return stream.getvalue()


def markdown(comparison: Comparison) -> str:
    """The comparison as a markdown table, for committed results."""
    table = comparison_table(comparison)
    headings = [str(c.header) for c in table.columns]
    cells = [[str(x) for x in c._cells] for c in table.columns]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(_plain(x) for x in row) + " |" for row in zip(*cells, strict=True)]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    import re

    return re.sub(r"\[/?[a-z ]*\]", "", text)


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return ""
    if summary.low is None or summary.high is None:
        return show(summary.mean)
    return f"{show(summary.mean)} ±{show((summary.high - summary.low) / 2)}"


def _coloured(text: str) -> Any:
    colour = {"removed": "green", "suppressed": "yellow", "retained": "red", "collapsed": "red", "over": "magenta"}
    for word, name in colour.items():
        if text.startswith(word):
            return f"[{name}]{text}[/{name}]"
    return text
