"""`expunge bench canvas`: UnlearnCanvas's protocol on the embedded text toy, or on one's own model, data and judges."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

from rich.markup import escape

from expunge.cli import show
from expunge.cli.work import method_specs
from expunge.errors import BadSetting
from expunge.files import write_atomic


def bench(
    methods: str, seeds: list[int], folder: Path, *, targets: str, small: bool, sequence: bool, model: str | None,
    retrained: str | None, second: str | None, data: Path | None, judges: Path | None, attacks: bool | list[str], told_attacks: str,
    prompts: bool, p4d: bool,
    samples: int, show_forgotten: bool, workers: int, table: Path | None,
) -> None:  # fmt: skip
    """Run it, print a table for each target, write contact sheets and the report."""
    from expunge.benchmarks import canvas_sequence, table_file, unlearncanvas
    from expunge.benchmarks.tables import heading
    from expunge.records.report import write_study

    chosen = method_specs(methods or unlearncanvas.METHODS)
    names = [text.strip() for text in targets.split(",") if text.strip()]
    if not names:
        raise BadSetting("expected at least one target, found none; write --targets red,three")
    if sequence:
        canvas_sequence.several(names)
    told = ["expunge bench canvas", f"--targets {targets!r}" if " " in targets else f"--targets {targets}"]
    told += [
        f"--methods {methods or unlearncanvas.METHODS}",
        f"--seeds {len(seeds) if seeds == list(range(len(seeds))) else ','.join(map(str, seeds))}",
    ]
    told += ["--small"] if small else []
    told += ["--no-attacks"] if attacks is False else [f"--attacks {told_attacks}"]
    told += ["--prompt-attacks"] if prompts and attacks is not True else []
    told += ["--p4d"] if p4d else []
    told += ["--sequence"] if sequence else []
    command, toy = " ".join(told), model is None
    if model is None:
        pieces = unlearncanvas.mini(small)
    else:
        from expunge.benchmarks.hub_canvas import from_folders

        pieces = from_folders(model, data, judges, retrained, second)
    sections: dict[str, Any] = {}
    found: dict[str, Any] = {}
    served: dict[str, Any] = {}
    began = time.perf_counter()
    with show.Report() as report:
        for text in names:
            found |= unlearncanvas.run(
                [text], chosen, seeds, bench=pieces, small=small, folder=folder, attacks=attacks, prompts=prompts, p4d=p4d, workers=workers,
                command=command, report=report, toy=toy,
            )  # fmt: skip
            if table is not None:
                sections[text] = unlearncanvas.section(folder / text.replace(" ", "-"), pieces, text, seeds)
                write_atomic(
                    table, table_file.write(heading(table.stem), sections)
                )  # what follows may fail; hours of runs stay
            _sheets(folder / text.replace(" ", "-"), pieces, text, seeds[0], samples or 2, show_forgotten)
        if sequence:
            served = canvas_sequence.serve(
                pieces, names, chosen, seeds, folder, small=small, toy=toy, command=command, report=report
            )
    if table is not None:
        sections |= canvas_sequence.sections(folder, pieces, seeds)
        write_atomic(table, table_file.write(heading(table.stem), sections))
    for text in names:
        show.out().print(f"\n[bold]{text}[/]")
        show.out().print(
            escape(unlearncanvas.table(found[text], unlearncanvas.control(pieces, text, seeds[0]))), soft_wrap=True
        )
    for name, rows in served.items():
        show.out().print(f"\n[bold]{escape(name)}[/]: {', '.join(names)} one after another")
        _rows(rows)
    if found:
        page = write_study(
            folder / "report.html", found, "UnlearnCanvas", f"{len(found)} targets, {time.perf_counter() - began:.0f} s"
        )
        show.out().print(f"report: {escape(str(page))}", soft_wrap=True)
    if table is not None and sections:
        show.out().print(f"table: {escape(str(table))}", soft_wrap=True)


def run_sheets(folder: Path, auditor: Any, outcome: Any, forgotten: bool) -> None:
    """pictures/kept.png of a run: original, unlearned, retrained under the same noise. forgotten: also what was to be forgotten, and
    the same after each attack: attacked.png and asked.png."""
    from expunge.benchmarks import canvas_sheets

    case, exam = outcome.case, outcome.case.exam
    if exam is None:
        return
    models = {"original": case.model, "unlearned": outcome.model}
    if auditor.gold.model is not None:
        models["retrained"] = auditor.gold.model
    canvas_sheets.write(folder, canvas_sheets.sheets(exam, models, forgotten=forgotten))
    if forgotten and auditor.gold.model is not None:
        canvas_sheets.write_attacked(folder, auditor, outcome.model)


def _sheets(folder: Path, pieces: Any, text: str, seed: int, samples: int, forgotten: bool) -> None:
    """Contact sheets of the original, of every method's model of one seed, and of the retrained one."""
    from expunge.benchmarks import canvas_sheets
    from expunge.parts.guarded import load_saved

    models = {"original": pieces.original(seed)}
    for run in sorted(folder.glob(f"*/seed{seed}/model")):
        base = copy.deepcopy(models["original"])  # a guard is put around it
        models[run.parent.parent.name] = load_saved(run, base)
    gold = pieces.retrained(seed, text)
    if gold is not None:
        models["retrained"] = gold
    exam = pieces.exam(pieces.target(text))
    for file in canvas_sheets.write(folder, canvas_sheets.sheets(exam, models, samples, forgotten)):
        show.out().print(f"sheet: {escape(str(file))}", soft_wrap=True)


def _rows(rows: list[dict[str, Any]]) -> None:
    from expunge.benchmarks.measuring import table

    names = list(dict.fromkeys(name for row in rows for name in row))
    show.out().print(escape(table([{name: row.get(name) for name in names} for row in rows])), soft_wrap=True)
