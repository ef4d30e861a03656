"""What `expunge.benchmarks.kill` runs and kills: one unlearning in a run directory, telling its steps as it goes.

A module of its own, because the server that forks these processes imports it beforehand and must not import the bench.
"""

from __future__ import annotations

import os
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import expunge
from expunge import files
from expunge.benchmarks.testbed import digits
from expunge.cases import Case, TensorData, requests
from expunge.engine import fit
from expunge.methods.registry import load_all
from expunge.parts.plan import Optimizer, Training

Fault = tuple[str, int, str]
"""(file, which writing of it, "half" or "unnamed")."""

# Here, so that the server has it done before it forks: all methods, and what torch's optimizers and digits import late.
load_all()
import_module("torch._dynamo")
import_module("sklearn.datasets")


def build() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def setup(weights: Path) -> Case:
    """Digits, forget class 3; the original is trained once and read from `weights` afterwards."""
    x, y, x_test, y_test = digits(600)
    recipe = Training(epochs=5, batch_size=64, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9))
    case = Case(build(), TensorData(inputs=x.flatten(1), labels=y), requests.label(3), recipe=recipe, build=build,
                test=TensorData(inputs=x_test.flatten(1), labels=y_test))  # fmt: skip
    if weights.exists():
        case.model.load_state_dict(load_file(weights))
        return case
    case = case.with_(model=fit(case, "train", 0))
    save_file(case.model.state_dict(), weights)
    return case


def work(folder: Path, run: str, epochs: int, every: int, die: Fault | None, tell: Any) -> None:
    """What a worker does. tell: a pipe that gets the number of every finished update; what it told is all that is left of it."""
    torch.set_num_threads(1)
    case = setup(folder / "original.safetensors")
    if die is not None:
        die_while_writing(*die)
    tell.send(0)
    expunge.unlearn(
        case, "salun", run=folder / run, checkpoint_steps=every, epochs=epochs, batch_size=64, floor=0.1,
        report=lambda _text, done, _total: tell.send(done),
    )  # fmt: skip


def die_while_writing(name: str, which: int, when: str) -> None:
    """Make this process kill itself at the `which`-th writing of a file: "half" of the bytes in, or whole but "unnamed"."""
    write_all, replace, seen = files._write_all, os.replace, [0]

    def to_target(handle: int) -> bool:
        return Path(os.readlink(f"/proc/self/fd/{handle}")).name.startswith(f".{name}.")

    def half(handle: int, content: bytes) -> None:
        if to_target(handle):
            seen[0] += 1
            if seen[0] == which and when == "half":
                os.write(handle, content[: len(content) // 2])
                os.fsync(handle)
                os.kill(os.getpid(), signal.SIGKILL)
        write_all(handle, content)

    def rename(source: Any, target: Any, **more: Any) -> None:
        if Path(target).name == name and seen[0] == which and when == "unnamed":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target, **more)

    files._write_all, os.replace = half, rename
