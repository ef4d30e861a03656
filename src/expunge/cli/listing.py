"""`expunge ls`: tables read off the registries."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from rich.markup import escape

from expunge.cli import show
from expunge.errors import BadSetting, nearest

Rows = tuple[list[str], list[list[str]]]
LONG = ("kinds", "paper", "source", "version", "needs of a method", "unit")
"""Columns that a terminal has no room for; `--markdown` and a row's own page have them."""


def listing(what: str, name: str | None = None, kind: str | None = None, markdown: bool = False) -> None:
    """Print the table of `what`; with a name, that row in full."""
    if what not in LISTS:
        raise BadSetting(f"expected one of {', '.join(LISTS)}, found '{what}'.{nearest(what, LISTS)}")
    if what == "methods" and name:
        return _one_method(name)
    columns, rows = LISTS[what](kind)
    if name:
        known = [row[0] for row in rows]
        if name not in known:
            raise BadSetting(f"expected one of {what}, found '{name}'.{nearest(name, known)} See: expunge ls {what}")
        (row,) = (row for row in rows if row[0] == name)
        for column, cell in zip(columns, row, strict=True):
            show.out().print(f"[bold]{column}[/]: {escape(cell)}", soft_wrap=True)
    elif markdown:
        print(show.markdown(columns, rows))
    else:
        brief = [i for i, column in enumerate(columns) if column not in LONG]
        show.out().print(show.table([columns[i] for i in brief], ([row[i] for i in brief] for row in rows)))


def _methods(kind: str | None) -> Rows:
    from expunge.methods import methods

    columns = [
        "method", "family", "intention", "mechanism", "guarantee", "needs of a method", "kinds", "paper", "in a sentence"
    ]  # fmt: skip
    rows = [
        [
            m.name, m.family, m.intention, m.mechanism, m.guarantee, ", ".join(m.needs) or "-", ", ".join(m.kinds), m.paper,
            m.summary,
        ]
        for m in methods(kind=kind).values()
    ]  # fmt: skip
    return columns, rows


def _one_method(name: str) -> None:
    from expunge.methods import find

    about, console = find(name), show.out()
    console.print(f"[bold]{about.name}[/]: {escape(about.summary)}")
    facts = {
        "family": about.family,
        "intention": about.intention,
        "guarantee": about.guarantee,
        "mechanism": about.mechanism,
        "needs": ", ".join(about.needs) or "nothing",
        "kinds of model": ", ".join(about.kinds),
        "paper": about.paper,
    }
    for key, value in facts.items():
        console.print(f"  {key}: {escape(value)}", soft_wrap=True)
    rows = [
        [key, "required" if field.is_required() else field.default, field.description or ""]
        for key, field in about.settings.model_fields.items()
    ]
    console.print(show.table(["setting", "default", "meaning"], rows))


def _tasks(kind: str | None) -> Rows:
    from expunge.tasks import TASKS

    def settings(task: type) -> str:
        return ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(task)) or "-"  # type: ignore[arg-type]

    rows = [
        [name, task.utility, settings(task), _first_line(task)] for name, task in TASKS.items() if kind in (None, name)
    ]
    return ["task", "utility", "settings", "in a sentence"], rows


def _checks(attack: bool) -> Callable[[str | None], Rows]:
    def table(kind: str | None) -> Rows:
        from expunge.audits import checks

        columns = [
            "attack" if attack else "check",
            "version",
            "unit",
            "best",
            "needs",
            "kinds",
            "in a sentence",
            "source",
        ]
        rows = [
            [c.name, c.version, c.unit or "-", "nearest retrained" if c.direction == "match" else c.direction,
             ", ".join(c.needs) or "-", ", ".join(c.kinds) or "any", c.summary, c.source]
            for c in checks(kind, attack=attack).values()
        ]  # fmt: skip
        return columns, rows

    return table


def _parts(room: str) -> Callable[[str | None], Rows]:
    def table(kind: str | None) -> Rows:
        import importlib

        package = importlib.import_module(f"expunge.parts.{room}")
        rows = []
        for name in package.__all__:
            part = getattr(package, name)
            if inspect.isfunction(part) and _returns(part) == room.removesuffix("s").capitalize():
                settings = str(inspect.signature(part)).partition(" -> ")[0].strip("()")
                rows.append([name, _plain(settings) or "-", _first_line(part)])
        return [room.removesuffix("s"), "settings", "in a sentence"], rows

    return table


def _returns(function: Any) -> str:
    """The name of what it returns: what makes a `Scope` is a scope, the helpers beside it are not."""
    value = inspect.signature(function).return_annotation
    return (value if isinstance(value, str) else getattr(value, "__name__", "")).split(".")[-1]


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]


def _plain(signature: str) -> str:
    return signature.replace("'", "")


LISTS: dict[str, Callable[[str | None], Rows]] = {
    "methods": _methods,
    "tasks": _tasks,
    "audits": _checks(False),
    "attacks": _checks(True),
    "scopes": _parts("scopes"),
    "objectives": _parts("objectives"),
}
