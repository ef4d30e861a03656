"""Data as a table of named columns with row numbers, whatever it was made from.

A row number is an example's identity: requests name rows, references are cached by row, certificates carry row digests.
`TensorData` keeps columns in memory and serves a batch by one index; `MapData` wraps any map-style dataset.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.errors import BadData
from expunge.tasks.base import Batch


class Data(ABC):
    """Rows of named columns."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, ids: Tensor) -> Batch:
        """The rows `ids` (B,) as a batch."""

    @abstractmethod
    def column(self, name: str) -> Tensor | list[Any]:
        """One column over all rows; errors name the columns there are."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Column names."""

    @property
    def lengths(self) -> Sequence[int] | None:
        """How long each row is, where rows differ: batches are then made of rows of about one length."""
        return None

    def telling_rows(self) -> Tensor:
        """Row numbers of a small batch that shows whether data and model fit (extremes where the data knows them)."""
        return torch.arange(min(8, len(self)))

    def save_beside(self, folder: Path) -> None:  # noqa: B027 (most data have nothing to write)
        """Write into a saved model's folder what the model needs to read such data (a tokenizer). Default: nothing."""

    def row_digests(self, ids: Tensor | Sequence[int]) -> list[str]:
        """sha256 of each row's content (all columns in name order): the only trace of an example in any record."""
        digests = []
        for row in torch.as_tensor(ids).tolist():
            batch = self.fetch(torch.tensor([row]))
            hasher = hashlib.sha256()
            for name in sorted(k for k in batch.columns if not k.startswith("_")):
                hasher.update(name.encode())
                hasher.update(_bytes(batch.columns[name]))
            digests.append(hasher.hexdigest())
        return digests

    def fingerprint(self) -> str:
        """sha256 over the row digests in order: equal data, equal fingerprint."""
        cached = getattr(self, "_fingerprint", None)
        if cached is None:
            hasher = hashlib.sha256(f"{len(self)}:{','.join(sorted(self.names))}".encode())
            for digest in self.row_digests(torch.arange(len(self))):
                hasher.update(bytes.fromhex(digest))
            cached = hasher.hexdigest()
            object.__setattr__(self, "_fingerprint", cached)
        return cached

    def subset(self, ids: Sequence[int] | Tensor) -> Data:
        """These rows as a table of their own; row numbers begin again."""
        return _Rows(self, torch.as_tensor(ids))


class _Rows(Data):
    """Some rows of a table, read through it."""

    def __init__(self, data: Data, rows: Tensor):
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, ids: Tensor) -> Batch:
        return Batch(ids, self.data.fetch(self.rows[ids]).columns)

    def column(self, name: str) -> Tensor | list[Any]:
        values = self.data.column(name)
        return values[self.rows] if isinstance(values, Tensor) else [values[i] for i in self.rows.tolist()]

    @property
    def names(self) -> list[str]:
        return self.data.names

    @property
    def lengths(self) -> Sequence[int] | None:
        own = self.data.lengths
        return None if own is None else [own[i] for i in self.rows.tolist()]


class TensorData(Data):
    """Columns held in memory: `TensorData(inputs=X, labels=y, group=g)`. Shared objects may ride along as `shared`."""

    def __init__(self, shared: Mapping[str, Any] | None = None, **columns: Any):
        if not columns:
            raise BadData("expected at least one column, found none; pass TensorData(inputs=X, labels=y)")
        self.columns = {k: _tensor(v, k) for k, v in columns.items()}
        self.shared = dict(shared or {})
        sizes = {k: int(v.shape[0]) for k, v in self.columns.items()}
        if len(set(sizes.values())) != 1:
            raise BadData(f"expected columns of one length, found {sizes}; give every column one entry per example")
        self._n = next(iter(sizes.values()))

    def __len__(self) -> int:
        return self._n

    @property
    def names(self) -> list[str]:
        return list(self.columns)

    def fetch(self, ids: Tensor) -> Batch:
        where = {
            place: ids.to(place) for place in {v.device for v in self.columns.values()}
        }  # one copy, not one per column
        return Batch(ids, {**self.shared, **{k: v[where[v.device]] for k, v in self.columns.items()}})

    def column(self, name: str) -> Tensor:
        if name not in self.columns:
            raise BadData(f"expected a column among {self.names}, found '{name}'; use one of them")
        return self.columns[name]

    def replaced(self, **columns: Any) -> TensorData:
        """The same table with some columns replaced or added."""
        return TensorData(shared=self.shared, **{**self.columns, **columns})

    def row_digests(self, ids: Tensor | Sequence[int]) -> list[str]:
        rows = torch.as_tensor(ids)
        parts = [(name.encode(), _rows_as_bytes(self.columns[name][rows])) for name in sorted(self.columns)]
        digests = []
        for i in range(len(rows)):
            hasher = hashlib.sha256()
            for name, values in parts:
                hasher.update(name)
                hasher.update(values[i])
            digests.append(hasher.hexdigest())
        return digests


class MapData(Data):
    """Any map-style dataset (torch, torchvision, Hugging Face): examples are turned into columns by `columns`.

    Args:
        dataset: has `__len__` and `__getitem__`.
        columns: one example -> mapping of values; default reads mappings and (input, label) pairs.
        workers: DataLoader-style worker threads are not used; datasets that are slow to read should be `.load()`ed.
    """

    def __init__(self, dataset: Any, columns: Callable[[Any], Mapping[str, Any]] | None = None):
        self.dataset, self.columns = dataset, columns or _default_columns

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def names(self) -> list[str]:
        return list(self.columns(self.dataset[0])) if len(self) else []

    def fetch(self, ids: Tensor) -> Batch:
        from torch.utils.data import default_collate

        rows = [{k: _as_value(v) for k, v in self.columns(self.dataset[i]).items()} for i in ids.tolist()]
        return Batch(ids, default_collate(rows))

    def column(self, name: str) -> Tensor | list[Any]:
        fast = getattr(self.dataset, "column_names", None)
        if fast and name in fast:
            values = list(self.dataset[name])
        else:
            if name not in self.names:
                raise BadData(f"expected a column among {self.names}, found '{name}'; use one of them")
            values = [self.columns(self.dataset[i])[name] for i in range(len(self))]
        if values and isinstance(values[0], (int, float, bool, np.number, Tensor)):
            return torch.as_tensor(np.asarray([v.item() if isinstance(v, Tensor) else v for v in values]))
        return values

    def load(self, batch_size: int = 1024) -> TensorData:
        """Everything in memory: one read now instead of one per epoch."""
        batches = [self.fetch(ids).columns for ids in torch.arange(len(self)).split(batch_size)]
        columns: dict[str, Any] = {
            k: torch.cat([b[k] for b in batches]) for k in batches[0] if isinstance(batches[0][k], Tensor)
        }
        return TensorData(**columns)


WINDOW = 4
"""Batches among whose shuffled rows those of about one length are put together."""


@dataclass(frozen=True)
class Split:
    """Named rows of a table. `augment` (a batch -> batch function of an rng) is applied in training only, by the engine."""

    name: str
    data: Data
    ids: Tensor
    augment: Callable[[Batch, torch.Generator], Batch] | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def batches(self, batch_size: int = 256) -> Iterator[Batch]:
        """In order, without augmentation: what audits and references read."""
        for ids in self.ids.split(batch_size):
            yield self.data.fetch(ids)

    def by_length(self, batch_size: int = 256) -> Iterator[Batch]:
        """Every row once, without augmentation, in the order that pads least; for readers that go by row number."""
        lengths = self.data.lengths
        ids = self.ids if lengths is None else self.ids[torch.as_tensor(lengths)[self.ids].argsort(stable=True)]
        for part in ids.split(batch_size):
            yield self.data.fetch(part)

    def order(self, rng: torch.Generator, batch_size: int) -> list[Tensor]:
        """Row numbers of one shuffled pass, cut into batches. Rows of different lengths are sorted within windows of
        `WINDOW` batches, and the batches shuffled again: every row once, little padding, no drift from short to long."""
        ids = self.ids[torch.randperm(len(self), generator=rng)]
        lengths = self.data.lengths
        if lengths is None or len(ids) <= batch_size:
            return list(ids.split(batch_size)) if len(ids) else []
        sizes = torch.as_tensor(lengths)
        windows = [part[sizes[part].argsort(stable=True)] for part in ids.split(WINDOW * batch_size)]
        batches = [batch for part in windows for batch in part.split(batch_size)]
        whole, rest = [b for b in batches if len(b) == batch_size], [b for b in batches if len(b) < batch_size]
        return [whole[i] for i in torch.randperm(len(whole), generator=rng).tolist()] + rest

    def shuffled(self, rng: torch.Generator, batch_size: int) -> Iterator[Batch]:
        """One shuffled pass, without augmentation."""
        for ids in self.order(rng, batch_size):
            yield self.data.fetch(ids)

    def subset(self, positions: Tensor, name: str | None = None) -> Split:
        """The rows at these positions of this split."""
        return Split(name or self.name, self.data, self.ids[positions], self.augment)

    def sample(self, size: int, rng: torch.Generator, name: str | None = None) -> Split:
        """At most `size` rows drawn without replacement."""
        return self.subset(torch.randperm(len(self), generator=rng)[:size].sort().values, name)


def as_data(source: Any, *, columns: Callable[[Any], Mapping[str, Any]] | None = None) -> Data:
    """A table from what people have: a `Data`, a mapping of arrays, an (X, y) pair, a TensorDataset, a map-style dataset,
    a Hugging Face dataset, or a path (see `expunge.cases.loading.load_data`)."""
    if isinstance(source, Data):
        return source
    if isinstance(source, (str, bytes)) or hasattr(source, "__fspath__"):
        from expunge.cases.loading import load_data

        return load_data(source)
    if isinstance(source, torch.utils.data.TensorDataset):
        source = source.tensors
    if isinstance(source, Mapping):
        return TensorData(**source)
    if isinstance(source, tuple) and len(source) == 2 and all(hasattr(part, "__len__") for part in source):
        return TensorData(inputs=source[0], labels=source[1])
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return MapData(source, columns)
    raise BadData(
        f"expected data as tensors, a mapping of columns, a map-style dataset or a path, found {type(source).__name__}; "
        "convert it to one of these"
    )


def check_finite(data: Data, name: str, batch_size: int = 4096) -> None:
    """Raise `BadData` naming the rows that hold NaN or infinity."""
    bad: list[int] = []
    for ids in torch.arange(len(data)).split(batch_size):
        batch = data.fetch(ids)
        for value in batch.columns.values():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:1] == ids.shape:
                rows = ~torch.isfinite(value).reshape(len(ids), -1).all(1)
                bad += ids[rows.cpu()].tolist()
    if bad:
        raise BadData(
            f"expected finite numbers in the {name} data, found NaN or infinity in {len(set(bad))} rows "
            f"(first: {sorted(set(bad))[:5]}); clean or drop these rows"
        )


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)  # models are float32 unless the caller passes float64 tensors
        return torch.from_numpy(np.ascontiguousarray(array))
    except (TypeError, ValueError) as error:
        raise BadData(
            f"expected column '{name}' as numbers, found {type(value).__name__}; convert it to a tensor"
        ) from error


def _default_columns(example: Any) -> Mapping[str, Any]:
    if isinstance(example, Mapping):
        return example
    if isinstance(example, Sequence) and len(example) == 2 and not isinstance(example, str):
        return {"inputs": example[0], "labels": example[1]}
    raise BadData(
        f"expected examples as mappings or (input, label) pairs, found {type(example).__name__}; pass columns=function"
    )


def _as_value(value: Any) -> Any:
    """Pictures become float tensors (C, H, W) in 0..1, double arrays float32; the rest is collated as it is."""
    if hasattr(value, "getbands") and hasattr(value, "convert"):
        array = np.asarray(value, dtype=np.float32) / 255.0
        return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return value.astype(np.float32)
    return value


def _bytes(value: Any) -> bytes:
    if isinstance(value, Tensor):
        return _rows_as_bytes(value[None])[0]
    return repr(value).encode()


def _rows_as_bytes(values: Tensor) -> list[bytes]:
    flat = values.detach().cpu().contiguous().reshape(values.shape[0], -1)
    return [row.tobytes() for row in flat.view(torch.uint8).numpy()] if flat.numel() else [b""] * values.shape[0]
