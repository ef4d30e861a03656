"""What must go: a request names rows, and what "of the forget kind" means on data never seen.

samples([3, 14, 15])            these rows
label(3)                        a whole class
where("age", "<=", 30)          a predicate over a column
none()                          nothing (for tests: a request that must change nothing)
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.cases.data import Data
from expunge.errors import BadRequest, nearest

OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Request:
    """Base of all requests: `rows` finds what must go, `kind` marks rows of unseen data that are of the same kind."""

    def rows(self, data: Data) -> Tensor:
        """Sorted row numbers (F,) int64 of the training table; raises `BadRequest`."""
        raise NotImplementedError

    def kind(self, data: Data) -> Tensor | None:
        """(N,) bool mask of rows of the forget kind, or None when the request names rows only."""
        return None

    def describe(self) -> dict[str, Any]:
        """What may be written in a record: never the data's content."""
        raise NotImplementedError


@dataclass(frozen=True)
class Samples(Request):
    ids: tuple[int, ...]

    def rows(self, data: Data) -> Tensor:
        ids = torch.tensor(self.ids, dtype=torch.int64)
        if len(ids) == 0:
            raise BadRequest("expected at least one row to forget, found none; name the rows, or skip the request")
        unique, counts = ids.unique(return_counts=True)
        if len(unique) != len(ids):
            twice = unique[counts > 1].tolist()
            raise BadRequest(
                f"expected each row once, found {len(twice)} rows named more than once (first: {twice[:5]}); remove duplicates"
            )
        outside = ids[(ids < 0) | (ids >= len(data))].tolist()
        if outside:
            raise BadRequest(
                f"expected row numbers in 0..{len(data) - 1}, found {len(outside)} outside (first: {outside[:5]}); "
                "check that the ids belong to this training set"
            )
        return unique

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(",".join(map(str, sorted(self.ids))).encode()).hexdigest()
        return {
            "kind": "samples",
            "summary": f"{len(self.ids)} rows by id",
            "count": len(self.ids),
            "ids_digest": digest,
        }


@dataclass(frozen=True)
class Where(Request):
    column: str
    op: str
    value: Any
    name: str = "where"

    def mask(self, data: Data) -> Tensor:
        values = data.column(self.column)
        if isinstance(values, Tensor):
            if values.dim() > 1 and values.shape[1:].numel() == 1:
                values = values.reshape(len(values))
            return OPERATORS[self.op](values, self.value)
        return torch.tensor([bool(OPERATORS[self.op](v, self.value)) for v in values])

    def rows(self, data: Data) -> Tensor:
        rows = self.mask(data).nonzero().squeeze(1)
        if len(rows) == 0:
            raise BadRequest(
                f"expected rows where {self.column} {self.op} {self.value}, found none; check the column's values"
            )
        return rows

    def kind(self, data: Data) -> Tensor | None:
        return self.mask(data) if self.column in data.names else None

    def describe(self) -> dict[str, Any]:
        # a number or a class is part of the question; a text may be a person's name, so only its digest is kept
        text = isinstance(self.value, str)
        shown = f"sha256:{hashlib.sha256(self.value.encode()).hexdigest()[:16]}" if text else self.value
        return {"kind": self.name, "summary": f"rows where {self.column} {self.op} {shown}"}


@dataclass(frozen=True)
class Nothing(Request):
    def rows(self, data: Data) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def describe(self) -> dict[str, Any]:
        return {"kind": "none", "summary": "nothing", "count": 0}


def samples(ids: Iterable[int]) -> Request:
    """Forget these rows of the training table."""
    return Samples(tuple(int(i) for i in ids))


def label(value: int, column: str = "labels") -> Request:
    """Forget a whole class."""
    return Where(column, "==", value, name="class")


def where(column: str, op: str, value: Any) -> Request:
    """Forget the rows where `column op value` holds; op is one of == != < <= > >=."""
    if op not in OPERATORS:
        raise BadRequest(f"expected an operator, one of {' '.join(OPERATORS)}, found {op!r}; use one of them")
    return Where(column, op, value)


def none() -> Request:
    """An empty request: every method must leave the model as it is."""
    return Nothing()


def from_settings(settings: Request | Mapping[str, Any]) -> Request:
    """A request as YAML spells it: `{samples: [1, 2]}`, `{label: 3}`, `{where: [age, "<", 30]}`."""
    if isinstance(settings, Request):
        return settings
    if isinstance(settings, Mapping) and len(settings) == 1:
        ((kind, value),) = settings.items()
        if kind == "samples":
            return samples(value)
        if kind == "label":
            return label(value)
        if kind == "where" and len(value) == 3:
            return where(*value)
        known = ("samples", "label", "where")
        raise BadRequest(f"expected a request, one of {', '.join(known)}, found '{kind}'.{nearest(str(kind), known)}")
    raise BadRequest(f"expected one of samples, label, where with its value, found {settings!r}; e.g. {{label: 3}}")
