"""Forget sets for studies. Which rows are asked for decides the ranking of methods, so a study tries several kinds.

Each function returns a request; `mislabelled` returns the data as well, since it plants the wrong labels. Equal seeds
give equal requests.

    request = forget_sets.random(data, fraction=0.1, seed=0)
    data, request = forget_sets.mislabelled(data, count=60, seed=0)      # data gains a column clean_labels
    request = forget_sets.highest_loss(data, model, "classification", count=50)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expunge.cases import requests
from expunge.cases.data import Data, Split, TensorData, as_data
from expunge.cases.requests import Request
from expunge.errors import BadData, BadRequest
from expunge.seeds import generator
from expunge.tasks import Task
from expunge.tasks import task as make_task
from expunge.tasks.base import evaluating, move_to_model


def random(data: Any, count: int | None = None, fraction: float | None = None, seed: int = 0) -> Request:
    """`count` rows, or a `fraction` of all, drawn without replacement."""
    rows = len(as_data(data))
    return requests.samples(_draw(torch.arange(rows), _size(rows, count, fraction), seed, "random"))


def by_class(label: int, column: str = "labels") -> Request:
    """A whole class."""
    return requests.label(label, column)


def by_group(data: Any, column: str, value: Any = None, seed: int = 0) -> Request:
    """All rows of one group (a user, a hospital, an author); drawn from the column's values if not given."""
    if value is None:
        values = as_data(data).column(column)
        groups = sorted(set(values.reshape(-1).tolist() if isinstance(values, Tensor) else values))
        value = groups[int(torch.randint(len(groups), (1,), generator=generator(seed, "forget_sets", "group")))]
    return requests.where(column, "==", value)


def mislabelled(
    data: Any, count: int | None = None, fraction: float | None = None, seed: int = 0, labels: str = "labels",
    classes: int | None = None,
) -> tuple[TensorData, Request]:  # fmt: skip
    """Plant wrong labels, uniform over the other classes, in drawn rows.

    Returns the data (true labels in the column `clean_labels`) and the request for those rows. Train the model on this
    data: it can only know such labels by memory, which makes forgetting measurable. classes: K, default: the largest
    label + 1.
    """
    table = as_data(data)
    table = table.load() if hasattr(table, "load") else table
    if not isinstance(table, TensorData):
        raise BadData(f"expected data in memory to change labels, found {type(table).__name__}; pass a TensorData")
    true = table.column(labels)
    if true.is_floating_point() or true.dim() != 1:
        raise BadData(
            f"expected class numbers in '{labels}', found {true.dtype} of {true.dim()} dimensions; pass int64 labels"
        )
    known = int(true.max()) + 1 if classes is None else classes
    if known < 2:
        raise BadData(f"expected at least two classes in '{labels}', found {known}; there is no wrong label to plant")
    rows = torch.tensor(_draw(torch.arange(len(table)), _size(len(table), count, fraction), seed, "mislabelled"))
    shift = torch.randint(1, known, (len(rows),), generator=generator(seed, "forget_sets", "wrong label"))
    wrong = true.clone()
    wrong[rows] = (true[rows] + shift.to(true.dtype)) % known
    return table.replaced(**{labels: wrong, "clean_labels": true.clone()}), requests.samples(rows.tolist())


def highest_loss(
    data: Any, model: nn.Module, task: str | Task = "classification", count: int | None = None,
    fraction: float | None = None,
) -> Request:  # fmt: skip
    """The rows that the model fits worst (ties by row number)."""
    return _by_loss(data, model, task, count, fraction, descending=True)


def lowest_loss(
    data: Any, model: nn.Module, task: str | Task = "classification", count: int | None = None,
    fraction: float | None = None,
) -> Request:  # fmt: skip
    """The rows that the model fits best (ties by row number)."""
    return _by_loss(data, model, task, count, fraction, descending=False)


def partly_identified(request: Request, data: Any, fraction: float, seed: int = 0) -> Request:
    """Only a drawn `fraction` of the rows of a request, as when only part of the bad data has been found. The rest
    stays in retain, which is what makes this hard: judge the result on all rows of the full request."""
    rows = request.rows(as_data(data))
    return requests.samples(_draw(rows, _size(len(rows), None, fraction), seed, "partly identified"))


def losses(data: Any, model: nn.Module, task: str | Task = "classification", batch_size: int = 512) -> Tensor:
    """(N,) the model's loss on every row, in eval mode, float64 on the CPU."""
    kind, table = make_task(task), as_data(data)
    found: list[Tensor] = []
    with evaluating(model):
        for batch in Split("train", table, torch.arange(len(table))).batches(batch_size):
            batch = move_to_model(kind.prepare(batch, generator(0, "forget_sets", "losses", len(found))), model)
            found.append(kind.loss(kind.forward(model, batch), batch).double().cpu())
    return torch.cat(found)


def _by_loss(
    data: Any, model: nn.Module, task: str | Task, count: int | None, fraction: float | None, descending: bool
) -> Request:
    table: Data = as_data(data)
    order = losses(table, model, task).argsort(descending=descending, stable=True)
    return requests.samples(sorted(order[: _size(len(table), count, fraction)].tolist()))


def _draw(rows: Tensor, size: int, seed: int, purpose: str) -> list[int]:
    order = torch.randperm(len(rows), generator=generator(seed, "forget_sets", purpose))
    return sorted(rows[order[:size]].tolist())


def _size(rows: int, count: int | None, fraction: float | None) -> int:
    if (count is None) == (fraction is None):
        raise BadRequest(f"expected count or fraction, found count={count} and fraction={fraction}; give exactly one")
    if fraction is not None and not 0 < fraction < 1:
        raise BadRequest(f"expected 0 < fraction < 1, found {fraction}; give a share of the rows")
    size = count if count is not None else max(round(float(fraction or 0) * rows), 1)
    if not 0 < size <= rows:
        raise BadRequest(f"expected between 1 and {rows} rows, found {size}; ask for fewer")
    return int(size)
