"""Requests one after another on one model (UnlearnCanvas's SU and SR): whether what went first stays away, and what is left.

    rows = in_sequence(bench, ["red", "three"], "uce")                                 # of one method and seed
    serve(bench, ["red", "three"], [("uce", {})], (0, 1, 2), folder, command="...")    # kept in the folder, for a table
    sections(folder, bench, (0, 1, 2))                                                 # of every kept sequence

After each request UA of every target so far, and over the cells that show none of them: IRA in the last request's domain, CRA in the
other, SR (right in every domain). Rebound: how far the first target's UA fell since its own request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expunge.audits.metrics.exam import Marks
from expunge.benchmarks import measuring
from expunge.benchmarks.canvas_judges import require_original
from expunge.benchmarks.table_file import Section
from expunge.benchmarks.unlearncanvas import Bench, configured
from expunge.errors import BadSetting
from expunge.files import digest_bytes, write_atomic
from expunge.records.compare import MethodSpec
from expunge.tasks.denoiser import Denoiser

FOLDER = "sequences"
Row = dict[str, Any]


def in_sequence(
    bench: Bench, targets: Sequence[str], method: MethodSpec, seed: int = 0, small: bool = False, toy: bool = True
) -> list[Row]:
    """The original's row (request 0), then one per request, in %; seconds of the unlearning alone."""
    from expunge.methods.outcome import unlearn

    model, state = bench.original(seed), None
    rows = [{"request": 0, "removed": "", **_accuracies(bench, targets, model)}]
    for number, text in enumerate(targets, 1):
        case = bench.case(text, seed, model, targets[: number - 1])
        (name, settings), = configured(bench, text, [method], small, toy)  # fmt: skip
        outcome = unlearn(case, name, seed=seed, floor=None, state=state, **settings)
        model, state = outcome.model, outcome.state or None
        row: Row = {"request": number, "removed": text, **_accuracies(bench, targets[:number], model)}
        first = f"UA {targets[0]}"
        row["rebound"] = 0.0 if number == 1 else rows[1][first] - row[first]
        row["seconds"] = outcome.record["cost"]["seconds"]
        rows.append(row)
    return rows


def _accuracies(bench: Bench, gone: Sequence[str], model: Denoiser) -> Row:
    """UA of each target; IRA, CRA and SR over the cells that show none of them, in their first words."""
    held = [bench.target(text) for text in gone]
    found: Row = {
        f"UA {text}": 100 * float(bench.exam(target).marks(model).unlearned().mean())
        for text, target in zip(gone, held, strict=True)
    }
    marks: Marks = bench.exam(held[-1]).marks(model)
    free = marks._of_cells([c.wording == 0 and not any(c.holds(t) for t in held) for c in marks.cells])
    for name, domains in (("IRA", marks.domains), ("CRA", marks.other_domains), ("SR", tuple(marks.names))):
        right = marks.kept(domains, free) if domains else np.zeros(0)
        found[name] = 100 * float(right.mean()) if len(right) else None
    return found


def serve(
    bench: Bench, targets: Sequence[str], methods: Sequence[tuple[str, dict[str, Any]]], seeds: Sequence[int], folder: str | Path, *,
    small: bool = False, toy: bool = True, command: str = "", report: Callable[[str, int, int], None] | None = None,
) -> dict[str, list[Row]]:  # fmt: skip
    """method, seed -> rows; each is kept in the folder as it is done, in the place of its namesake."""
    several(targets)
    for seed in seeds:
        require_original(bench.exam(bench.target(targets[0])), bench.original(seed), bench.base)
    jobs, found = [(method, seed) for method in methods for seed in seeds], {}
    for number, ((name, settings), seed) in enumerate(jobs):
        if report is not None:
            report(f"{name} in sequence, seed {seed}", number, len(jobs))
        rows = in_sequence(bench, targets, (name, settings), seed, small, toy)
        label = _label(name, settings)
        about = {
            "targets": list(targets),
            "method": label,
            "seed": seed,
            "command": command,
            "time": time.time(),
            "rows": rows,
        }
        key = digest_bytes(json.dumps(settings, sort_keys=True, default=str).encode())[:8] if settings else "defaults"
        place = Path(folder) / FOLDER / ",".join(targets).replace(" ", "-") / f"{name}-{key}" / f"seed{seed}.json"
        write_atomic(place, json.dumps(about, indent=1))
        found[f"{label}, seed {seed}"] = rows
    return found


def several(targets: Sequence[str]) -> None:
    """Refuse a sequence of one."""
    if len(targets) < 2:
        raise BadSetting(
            f"expected two targets or more for a sequence, found {len(targets)}; write --targets red,three"
        )


def sections(folder: str | Path, bench: Bench, seeds: Sequence[int]) -> dict[str, Section]:
    """`red, then three` -> its section of a committed table: every kept sequence of these seeds, with the command that made it."""
    found: dict[str, Section] = {}
    for place in sorted((Path(folder) / FOLDER).glob("*")):
        kept = [json.loads(file.read_text("utf-8")) for seed in seeds for file in place.glob(f"*/seed{seed}.json")]
        if kept:
            kept.sort(key=lambda one: one["time"])
            found[", then ".join(kept[0]["targets"])] = _section(kept, bench)
    return found


def _section(kept: Sequence[dict[str, Any]], bench: Bench) -> Section:
    lines: list[Row] = []
    made: dict[str, dict[str, None]] = {}
    seen: set[int] = set()
    order = list(dict.fromkeys(one["method"] for one in kept))
    for one in sorted(kept, key=lambda one: (order.index(one["method"]), one["seed"])):
        made.setdefault(f"`{one['command']}`", {})[one["method"]] = None
        for row in one["rows"]:
            if row["request"] == 0 and one["seed"] in seen:
                continue
            seen.add(one["seed"])
            who = "original" if row["request"] == 0 else one["method"]
            name = f"{who}, seed {one['seed']}" + (f", {row['request']}. {row['removed']}" if row["request"] else "")
            lines.append({"model": name, **{k: v for k, v in row.items() if k not in ("request", "removed")}})
    lines.sort(key=lambda line: not line["model"].startswith("original, "))
    columns = list(
        dict.fromkeys(["model", *(f"UA {text}" for text in kept[0]["targets"]), *(k for line in lines for k in line)])
    )
    table = measuring.table([{name: line.get(name) for name in columns} for line in lines])
    note = (
        f"One after another on one model, a row after each request. {'; '.join(str(judge) for judge in bench.judges)}. "
        f"{len(bench.answer_seeds)} images a cell. UA of every target so far; IRA (the last target's domain), CRA (the other) and SR "
        "(every domain) over the cells that show none of the targets so far, in %; rebound: how far UA of the first target fell since its "
        "request."
    )
    whole = Section.of(note, table, "")
    return Section(note, whole.head, whole.rows, {command: ", ".join(labels) for command, labels in made.items()})


def _label(name: str, settings: dict[str, Any]) -> str:
    told = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"{name} ({told})" if told else name
