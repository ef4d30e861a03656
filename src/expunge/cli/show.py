"""What the commands print with: two consoles, progress bars, panels and tables. Needs no torch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table


def out() -> Console:
    """Results go to stdout. Made anew at each call, because tests replace sys.stdout. A file or a pipe has no width of its
    own: tables get room."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=132)


def err() -> Console:
    """Progress, warnings and errors go to stderr."""
    return Console(stderr=True, highlight=False)


def error_panel(error: BaseException) -> None:
    """One panel per error: its kind as the title, its three beats as the text."""
    err().print(Panel(escape(str(error)), title=type(error).__name__, border_style="red", title_align="left"))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> Table:
    """A plain table; the first column never wraps."""
    made = Table(title=title or None, title_justify="left", show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, no_wrap=i == 0, overflow="fold", style="bold" if i == 0 else "")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    return made


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same table for documents."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    return "\n".join(lines)


class Report:
    """`with Report() as report:` shows `report(text, done, total)` as bars; off a terminal, a line now and then.

    Warnings raised inside are shown as one line each, above the bars.
    """

    kept = 5
    """Bars on the screen; older ones leave it."""
    pause = 1.0
    """Seconds between two lines off a terminal."""

    def __enter__(self) -> Report:
        self.console = err()
        self.tasks: dict[str, TaskID] = {}
        self.told = float("-inf")
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console, disable=not self.console.is_terminal, transient=True,
        )  # fmt: skip
        self.bars.start()
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.showwarning = self._warning
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._caught.__exit__(kind, error, trace)
        self.bars.stop()

    def __call__(self, text: str, done: int, total: int) -> None:
        if text not in self.tasks:
            self.tasks[text] = self.bars.add_task(escape(text), total=total)
            for old in list(self.tasks)[: -self.kept]:
                self.bars.remove_task(self.tasks.pop(old))
        self.bars.update(self.tasks[text], completed=done, total=total or None)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.told >= self.pause:
            self.told = now
            self.console.print(f"{escape(text)} ({done}/{total})", soft_wrap=True)

    def _warning(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        self.console.print(f"[yellow]![/] {category.__name__}: {escape(str(message))}", soft_wrap=True)
