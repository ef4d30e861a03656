"""A committed table as a file: sections of rows, so that a run of some requests or some methods leaves the others as they were.

    # title
    what holds for all sections

    ## request
    note
    | model | ... |
    |---|...|
    | original | ... |
    Made by:
    * `command` in 12 s: all rows

Rows of one section must come from the same seeds and columns to stand side by side; each "Made by" line names its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from expunge.errors import BadData
from expunge.records.comparison import t_summary

REFERENCES = ("original", "retrained")
ALL = "all rows"


@dataclass
class Section:
    """note: text above the table. head: its two first lines. rows: first cell -> line. made: by which command which rows."""

    note: str
    head: tuple[str, ...] = ()
    rows: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, note: str, table: str, command: str, part: bool = False) -> Section:
        """A fresh section from a markdown table. part: the rows of some methods alone."""
        lines = table.strip().splitlines()
        rows = {_name(line): line for line in lines[2:]}
        about = ", ".join(name for name in rows if name not in REFERENCES) if part else ALL
        return cls(note, tuple(lines[:2]), rows, {command: about})

    def merged(self, new: Section, order: Sequence[str] = ()) -> Section:
        """Rows of `new` take the places of their namesakes, the others stay; `order` is that of the whole table."""
        if self.head != new.head:
            raise BadData(
                f"expected rows with the table's columns ({self.head[0]}), found others ({new.head[0]}); run the whole "
                "section without --methods"
            )
        changed = [name for name in REFERENCES if name in self.rows and self.rows[name] != new.rows.get(name)]
        if changed:
            raise BadData(
                f"expected the references of the rows that stay, found another {' and '.join(changed)} (other seeds, or "
                "another original); run the whole section without --methods"
            )
        rows = {**self.rows, **new.rows}
        names = [name for name in (*REFERENCES, *order) if name in rows]
        names += [name for name in rows if name not in names]
        made = {}
        for command, about in self.made.items():  # a row is of its last command
            left = [n for n in self._rows_of(about) if n not in new.rows]
            if left:
                made[command] = ", ".join(left)
        return Section(new.note, self.head, {name: rows[name] for name in names}, {**made, **new.made})

    def _rows_of(self, about: str) -> list[str]:
        return [name for name in self.rows if name not in REFERENCES] if about == ALL else about.split(", ")

    def __str__(self) -> str:
        made = "\n".join(f"* {command}: {about}" for command, about in self.made.items())
        return "\n".join([self.note, "", *self.head, *self.rows.values(), "", "Made by:", "", made, ""])


def read(text: str) -> dict[str, Section]:
    """The sections of a table file, by their headings."""
    found: dict[str, Section] = {}
    for part in text.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        lines = body.splitlines()
        table = [line for line in lines if line.startswith("|")]
        first = lines.index(table[0]) if table else len(lines)
        made = dict(line.removeprefix("* ").rsplit(": ", 1) for line in lines[first:] if line.startswith("* "))
        found[title.strip()] = Section(
            "\n".join(lines[:first]).strip(), tuple(table[:2]), {_name(line): line for line in table[2:]}, made
        )
    return found


def merge(old: str, new: dict[str, Section], partly: bool, order: dict[str, Sequence[str]]) -> dict[str, Section]:
    """Sections of the old text with the new ones in their places. partly: new sections hold some methods' rows alone.
    order: section -> its methods; sections that it does not name come last."""
    before = read(old)
    after = dict(before)
    for title, section in new.items():
        after[title] = before[title].merged(section, order[title]) if partly and title in before else section
    return {title: after[title] for title in [*(t for t in order if t in after), *(t for t in after if t not in order)]}


def write(heading: str, sections: dict[str, Section]) -> str:
    return heading.rstrip() + "\n\n" + "\n".join(f"## {title}\n\n{section}" for title, section in sections.items())


def spread(values: Sequence[float]) -> str:
    """A cell: the mean over seeds, ± half its 95% t-interval; empty without values."""
    found = t_summary(values)
    if found is None:
        return ""
    half = 0.0 if found.high is None else found.high - found.mean
    return f"{found.mean:.4g}" + (f" ± {half:.2g}" if half else "")


def _name(line: str) -> str:
    return line.split("|")[1].strip()
