"""Commands over records: `report` and `verify`. They need no torch, so a certificate can be checked anywhere."""

from __future__ import annotations

import json
from pathlib import Path

from rich.markup import escape

from expunge.cli import show
from expunge.errors import BadData

RECORDS = ("results.json", "comparison.json")


def report(run: Path) -> None:
    """report.html beside the record that it shows."""
    from expunge.records.comparison import Comparison
    from expunge.records.report import write_report
    from expunge.records.results import Results

    record = run if run.is_file() else next((run / name for name in RECORDS if (run / name).exists()), None)
    if record is None:
        raise BadData(f"expected {' or '.join(RECORDS)} in {run}, found neither; run 'expunge audit {run}' first")
    comparison = _schema(record).startswith("expunge.comparison/")
    page = write_report(record.parent / "report.html", (Comparison if comparison else Results).load(record))
    show.out().print(f"report: {escape(str(page))}")


def verify(certificate: Path, weights: Path | None, results: Path | None, key: str | None) -> None:
    """Print what was checked; `VerificationFailed` tells what differs. A run's folder brings weights and results."""
    from expunge.records.certificate import verify as check

    if certificate.is_dir():
        folder, certificate = certificate, certificate / "certificate.json"
        weights = weights or _there(folder / "model")
        results = results or _there(folder / "results.json")
    found = check(certificate, weights, results, key)
    show.out().print(escape(str(found)))
    section = found.certificate["sections"].get("verdict") or {}
    if section.get("verdict"):
        show.out().print(f"[bold]Verdict when it was signed:[/] {escape(section['verdict'])}")


def _there(path: Path) -> Path | None:
    return path if path.exists() else None


def _schema(file: Path) -> str:
    try:
        return str(json.loads(file.read_text("utf-8"))["schema"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # the record's own reader says what is wrong
