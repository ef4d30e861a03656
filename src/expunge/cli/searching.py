"""`expunge search`: settings of the case's method, chosen on one half of its rows and told on the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.markup import escape

from expunge.cli import show
from expunge.cli.build import build_case
from expunge.cli.config import parse_value, read_case
from expunge.errors import BadSetting


def space_of(texts: list[str]) -> dict[str, Any]:
    """`lr=1e-4..0.1:log`, `density=0.1..0.9` and `policy=other,uniform` as ranges and values."""
    space: dict[str, Any] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name or not values:
            raise BadSetting(f"expected --over setting=low..high[:log] or setting=a,b,c, found '{text}'; correct it")
        if ".." in values:
            ends, _, scale = values.partition(":")
            low, high = (parse_value(end) for end in ends.split("..", 1))
            space[name] = (low, high, scale) if scale else (low, high)
        else:
            space[name] = [parse_value(value) for value in values.split(",")]
    return space


def search(file: Path, overrides: list[str], over: list[str], trials: int, least: float, out: Path | None) -> None:
    """Search, print the front, keep search.json."""
    from expunge.files import write_atomic
    from expunge.records.search import search as searching

    case_file = read_case(file, overrides)
    if case_file.method is None:
        raise BadSetting("expected a method in the case file, found none; add 'method: npo' or pass method=npo")
    space, name = space_of(over), case_file.method.name
    fixed = {key: value for key, value in case_file.method.settings.items() if key not in space}
    folder = out or case_file.run_folder.parent / f"{case_file.name}-search"
    with show.Report() as report:
        found = searching(
            build_case(case_file),
            name,
            space,
            trials,
            case_file.seeds.unlearning,
            fixed=fixed,
            least=least,
            report=report,
        )
    path = write_atomic(folder / "search.json", json.dumps(found.describe(), indent=1, default=str) + "\n")
    rows = [
        ("*" if t == found.chosen else "", t.number, f"{t.forget:.4f}", f"{t.kept:.4f}", *(f"{t.settings[k]:.4g}"
         if isinstance(t.settings[k], float) else str(t.settings[k]) for k in space))
        for t in found.front
    ]  # fmt: skip
    console = show.out()
    console.print(
        show.table(["", "trial", "forget gap", "utility kept", *space], rows, f"{name}: trials that none beats")
    )
    chosen = " ".join(f"method.{key}={found.chosen.settings[key]}" for key in space)
    console.print(
        f"chosen: {escape(chosen)} (least utility {least:g}; {len(found.done)} of {trials} trials ran)", soft_wrap=True
    )
    console.print(f"search: {escape(str(path))}", soft_wrap=True)
