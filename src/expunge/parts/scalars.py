"""What a frozen model says about the rows of a split, kept on disk and read back as memory maps.

A file is named by a digest of all that its numbers depend on: the model's weights and class, the data, the rows and the
task's settings. Another model or other data is another file, so nothing is ever out of date.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from expunge.files import digest_weights, write_atomic

if TYPE_CHECKING:
    from expunge.cases.data import Split
    from expunge.tasks.base import Task


class Scalars:
    """A folder of tables over row numbers: `loss` and `log_likelihood` (rows,), `output` (rows, ...)."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def mark(self, model: nn.Module, split: Split, task: Task) -> str:
        """The digest that stands for these rows seen by this model."""
        about = {
            "model": [type(model).__qualname__, digest_weights(model.state_dict())],
            "data": split.data.fingerprint(),
            "rows": hashlib.sha256(split.ids.cpu().numpy().tobytes()).hexdigest(),
            "task": repr(task),
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def read(self, mark: str) -> dict[str, Tensor] | None:
        """The tables, paged in as they are read; None where there are none, or not whole ones."""
        try:
            with safe_open(str(self._file(mark)), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError):
            return None

    def write(self, mark: str, tables: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the tables, and give them back as they now lie on disk."""
        write_atomic(self._file(mark), save({name: value.cpu().contiguous() for name, value in tables.items()}))
        return self.read(mark) or tables

    def _file(self, mark: str) -> Path:
        return self.folder / f"{mark[:32]}.safetensors"
