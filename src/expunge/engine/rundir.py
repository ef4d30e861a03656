"""A run directory: config.yaml, env.json, request.json, metrics.jsonl, results.json, model/, report.html, certificate.json.

One process at a time (a file lock that the system drops when the process dies, however it dies). Every file is written whole
or not at all, except metrics.jsonl, which grows by lines and is cut back to the checkpoint on resume.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from expunge.cases.weights import load_weights as load_weights
from expunge.cases.weights import save_model
from expunge.engine.distribution import follows
from expunge.errors import DiskFull, RunBusy
from expunge.files import write_atomic

LIBRARIES = (
    "torch",
    "numpy",
    "accelerate",
    "transformers",
    "datasets",
    "peft",
    "torchjd",
    "scikit-learn",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Versions of Python, Expunge and the libraries that shape the numbers."""
    found = {"python": platform.python_version()}
    for name in ("expunge", *LIBRARIES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the run ran on, without names of people or hosts."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(), "gpu": gpu,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


class RunDirectory:
    """`with RunDirectory(path) as run:` holds the lock while inside.

    Of several processes of one run, the first holds the lock and writes; the others only read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._lock: Any = None
        self._metrics: Any = None
        self.reads_only = follows()

    def __enter__(self) -> RunDirectory:
        self.path.mkdir(parents=True, exist_ok=True)
        if self.reads_only:
            return self
        self._lock = open(self.path / ".lock", "a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            self._lock = None
            raise RunBusy(
                f"expected the run directory {self.path} to be free, found process {holder} working in it; "
                "wait for it, or use another directory"
            ) from error
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # lines that a full disk refused; a resumed run writes them again
                self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            self._lock.truncate(0)
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    # -- files -----------------------------------------------------------------------------------------------------
    def write_json(self, name: str, value: Any) -> None:
        if not self.reads_only:
            write_atomic(self.path / name, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def write_config(self, config: dict[str, Any]) -> None:
        if not self.reads_only:
            write_atomic(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def write_environment(self) -> None:
        self.write_json("env.json", {"versions": versions(), "machine": machine(), "argv": Path(sys.argv[0]).name})

    def start_metrics(self, history: list[dict[str, Any]]) -> None:
        """metrics.jsonl as it was at the checkpoint; later lines of a killed run are dropped."""
        if self.reads_only:
            return
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(h) + "\n" for h in history))
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed on exit)

    def log(self, entry: dict[str, Any]) -> None:
        if self._metrics is None:
            return
        try:
            self._metrics.write(json.dumps(entry) + "\n")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFull(
                f"expected room for another line of metrics.jsonl in {self.path}, and the disk is full; free some space and "
                "run the same command again: it goes on from the last checkpoint"
            ) from error

    # -- models ----------------------------------------------------------------------------------------------------
    @property
    def model_path(self) -> Path:
        return self.path / "model"

    def save_model(self, model: nn.Module) -> None:
        save_model(model, self.model_path)
