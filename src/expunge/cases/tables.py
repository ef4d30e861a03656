"""Tables from files: .npz, .csv, .tsv, .jsonl, .parquet become named columns with `inputs` and `labels` among them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.cases.data import Data, MapData, TensorData
from expunge.errors import BadData, nearest, need_extra

INPUTS = ("inputs", "img", "image", "pixel_values", "x", "X", "features", "data")
LABELS = ("labels", "label", "target", "targets", "y", "Y", "fine_label", "class")


def read_file(path: Path | Sequence[Path], inputs: str | None = None, labels: str | None = None) -> Data:
    """One file, or several parquet files of one table. Text columns are kept (for requests by predicate)."""
    files = [path] if isinstance(path, Path) else list(path)
    try:
        if files[0].suffix == ".npz":
            return _arrays(files[0], inputs, labels)
        if files[0].suffix == ".parquet":
            return _parquet(files, inputs, labels)
        columns = _json_lines(files[0]) if files[0].suffix == ".jsonl" else _separated(files[0])
    except (OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        if isinstance(error, BadData):
            raise
        raise BadData(
            f"expected a readable {files[0].suffix} file, found {files[0].name} damaged or of another kind "
            f"({type(error).__name__}: {error}); write it again"
        ) from error
    return as_table(columns, inputs, labels)


def read_columns(path: Path) -> dict[str, list[Any]]:
    """The columns of a .jsonl, .json (one object per line), .csv, .tsv or .parquet file as they stand, texts as texts."""
    try:
        if path.suffix in (".jsonl", ".json"):
            return _json_lines(path)
        if path.suffix in (".csv", ".tsv"):
            return _separated(path)
        if path.suffix == ".parquet":
            table = need_extra("pyarrow.parquet", "huggingface").read_table(path)
            return {name: table.column(name).to_pylist() for name in table.column_names}
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, BadData):
            raise
        raise BadData(
            f"expected a readable {path.suffix} file, found {path.name} damaged or of another kind "
            f"({type(error).__name__}: {error}); write it again"
        ) from error
    raise BadData(f"expected a table as .jsonl, .json, .csv, .tsv or .parquet, found '{path.name}'; convert it")


def renamed(names: Sequence[str], inputs: str | None, labels: str | None) -> dict[str, str]:
    """Which columns become `inputs` and `labels`: those named by the caller, else the usual ones."""
    found = {}
    for target, asked, usual in (("inputs", inputs, INPUTS), ("labels", labels, LABELS)):
        if asked is not None and asked not in names:
            raise BadData(f"expected a column among {', '.join(names)}, found '{asked}'.{nearest(asked, names)}")
        source = asked or next((name for name in usual if name in names), None)
        if source is not None and source != target:
            found[source] = target
    return found


def as_table(columns: dict[str, list[Any] | Tensor], inputs: str | None, labels: str | None) -> Data:
    """Columns of numbers in memory; with any text column, a table of rows that keeps it."""
    names = renamed(list(columns), inputs, labels)
    columns = {names.get(name, name): values for name, values in columns.items()}
    if "labels" in columns and _is_text(columns["labels"]):
        order = {value: code for code, value in enumerate(sorted(set(columns["labels"])))}
        columns["label_names"] = columns["labels"]
        columns["labels"] = torch.tensor([order[value] for value in columns["labels"]])
    table = {name: values if isinstance(values, Tensor) or _is_text(values) else _numbers(name, values)
             for name, values in columns.items()}  # fmt: skip
    if "inputs" not in table:
        flat = {k: v for k, v in table.items() if isinstance(v, Tensor) and v.dim() == 1 and k != "labels"}
        if not flat:
            raise BadData(
                f"expected an inputs column or columns of numbers, found {', '.join(columns)}; name it by inputs=..."
            )
        table = {"inputs": torch.stack([v.to(torch.float32) for v in flat.values()], 1), **table}
    if all(isinstance(values, Tensor) for values in table.values()):
        return TensorData(**table)  # type: ignore[arg-type]
    rows = len(next(iter(table.values())))
    return MapData([{name: values[i] for name, values in table.items()} for i in range(rows)])


def _is_text(values: Any) -> bool:
    return not isinstance(values, Tensor) and any(isinstance(value, str) for value in values)


def _numbers(name: str, values: list[Any]) -> Tensor:
    try:
        array = np.asarray([float("nan") if value is None else value for value in values])
    except ValueError as error:
        raise BadData(
            f"expected every entry of column '{name}' to have one shape, found several; pad or crop them first"
        ) from error
    if array.dtype == object:
        raise BadData(
            f"expected numbers or text in column '{name}', found mixed values; clean the column or leave it out"
        )
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)


def _arrays(path: Path, inputs: str | None, labels: str | None) -> Data:
    with np.load(path, allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files}
    names = renamed(list(columns), inputs, labels)
    return TensorData(**{names.get(name, name): values for name, values in columns.items()})


def _separated(path: Path) -> dict[str, Any]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        rows = list(reader)
    if not reader.fieldnames or not rows:
        raise BadData(
            f"expected a header and rows in {path.name}, found {len(rows)} rows; write it again with a header"
        )
    ragged = [i for i, row in enumerate(rows) if None in row or None in row.values()]
    if ragged:
        raise BadData(
            f"expected {len(reader.fieldnames)} cells in every row, found others in rows {ragged[:5]}; mend them"
        )
    return {name: _cells([row[name] for row in rows]) for name in reader.fieldnames}


def _cells(values: list[str]) -> list[Any]:
    """Whole numbers where all are, else numbers (an empty cell is NaN), else text."""
    for kind in (int, lambda v: float(v) if v.strip() else float("nan")):
        try:
            return [kind(value) for value in values]
        except ValueError:
            continue
    return values


def _json_lines(path: Path) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    if not rows or not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        raise BadData(f"expected one JSON object of the same keys per line in {path.name}, found other; write it so")
    return {name: [row[name] for row in rows] for name in rows[0]}


def _parquet(files: list[Path], inputs: str | None, labels: str | None) -> Data:
    """Numbers, lists and text in memory; encoded pictures by `datasets`, decoded when read (`.load()` reads all
    once)."""
    pyarrow, parquet = need_extra("pyarrow", "huggingface"), need_extra("pyarrow.parquet", "huggingface")
    table = pyarrow.concat_tables([parquet.read_table(file) for file in files])
    if not any(pyarrow.types.is_struct(field.type) or pyarrow.types.is_binary(field.type) for field in table.schema):
        return as_table({name: table.column(name).to_pylist() for name in table.column_names}, inputs, labels)
    datasets = need_extra("datasets", "huggingface")
    dataset = datasets.Dataset(table)
    for field in table.schema:
        encoded = pyarrow.types.is_struct(field.type) and {"bytes", "path"} == {part.name for part in field.type}
        if encoded and not isinstance(dataset.features[field.name], datasets.Image):
            dataset = dataset.cast_column(field.name, datasets.Image())
    names = renamed(dataset.column_names, inputs, labels)
    return MapData(dataset.rename_columns(names) if names else dataset)
