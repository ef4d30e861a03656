"""kill -9 at random moments and in the middle of writing: a run resumed has the tensors of one that nobody disturbed.

    python -m expunge.benchmarks.kill                        # 24 random moments + 10 while files are written; about 3 minutes
    python -m expunge.benchmarks.kill --points 60

Every point is a run directory of its own: a process runs `unlearn(case, "salun", run=directory, checkpoint_steps=4)`, is
killed with SIGKILL, and is started again until it ends; the weights it saves are compared with the undisturbed run's by their
bytes. Processes are forks of a clean server that has only imported (a start costs nothing then); some are resumed in a new
interpreter instead. The network has dropout and batch norm, and the optimizer momentum, so draws, statistics and state must all come back.

Random moments are drawn uniformly over the time that an undisturbed run works (imports excluded). Moments within a write are met
by a fault inside the worker: it kills itself with half of the bytes of a checkpoint (model, outcome) written, or with the file
whole but not yet renamed.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import expunge
from expunge import files
from expunge.benchmarks.measuring import options, publish, spelled, table
from expunge.benchmarks.testbed import digits
from expunge.cases import Case, TensorData, requests
from expunge.engine import fit
from expunge.files import digest_weights
from expunge.methods.registry import load_all
from expunge.parts.plan import Optimizer, Training
from expunge.seeds import generator

NAME = "kill"
Fault = tuple[str, int, str]
"""(file, which writing of it, "half" or "unnamed")."""
WRITES = (
    ("checkpoint.safetensors", 1), ("checkpoint.safetensors", 7), ("checkpoint.safetensors", 20), ("model.safetensors", 1),
    ("outcome.json", 1),
)  # fmt: skip
"""(file, which writing of it) that the worker dies in."""

load_all()  # here, so that the server which forks the workers has it done


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


@dataclass
class Worker:
    """A process at work in a run directory, and the pipe that it tells its updates by."""

    process: Any
    told: Any
    steps: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, context: Any, folder: Path, run: str, epochs: int, every: int, die: Fault | None = None) -> Worker:
        told, tell = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(folder, run, epochs, every, die, tell))
        process.start()
        tell.close()
        return cls(process, told)

    def wait(self) -> int:
        """Read to the end; the exit status (minus the signal's number where one ended it)."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                self.steps.append(self.told.recv())
        self.process.join()
        return self.process.exitcode

    def finish(self) -> None:
        status = self.wait()
        if status:
            raise RuntimeError(f"expected the resumed run to end well, found exit status {status}; its error is above")


def saved_step(folder: Path, run: str) -> int:
    """The step of the checkpoint that the next start goes on from; 0 without one."""
    file = folder / run / "checkpoint.safetensors"
    if not file.exists():
        return 0
    with safe_open(str(file), framework="pt") as opened:
        return json.loads(opened.metadata()["position"])["step"]


def point(
    folder: Path, run: str, epochs: int, every: int, delay: float | None, die: Fault | None, truth: str, fresh: bool
) -> dict[str, Any]:  # fmt: skip
    """Kill one run once, start it again, compare. fresh: again in a new interpreter, else in a fork of the clean server."""
    server = multiprocessing.get_context("forkserver")
    worker = Worker.start(server, folder, run, epochs, every, die)
    if delay is not None:
        worker.steps.append(worker.told.recv())  # 0: work begins
        time.sleep(delay)
        worker.process.kill()
    killed = worker.wait() == -signal.SIGKILL
    resumed, parts = saved_step(folder, run), len(list((folder / run).rglob(".*.part")))
    where = "random moment" if die is None else "{0}, writing {1}, {2}".format(*die)
    if killed:
        Worker.start(multiprocessing.get_context("spawn") if fresh else server, folder, run, epochs, every).finish()
    return {
        "killed": where if killed else "(had ended)", "at step": worker.steps[-1] if worker.steps else 0,
        "went on from step": resumed, "half-written files": parts, "in": "new interpreter" if fresh else "fork",
        "equal": digest_weights(folder / run / "model" / "model.safetensors") == truth,
    }  # fmt: skip


def measure(
    folder: Path, points: int, writes: int, epochs: int, every: int, seed: int, fresh: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """One row per killed run, and what the undisturbed run was."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([f"expunge.benchmarks.{NAME}"])
    setup(folder / "original.safetensors")
    worker = Worker.start(server, folder, "undisturbed", epochs, every)
    worker.told.recv()
    began = time.perf_counter()
    worker.finish()
    span = time.perf_counter() - began
    truth = digest_weights(folder / "undisturbed" / "model" / "model.safetensors")
    record = json.loads((folder / "undisturbed" / "outcome.json").read_text())["record"]
    rows, rng = [], generator(seed, "kill")
    while sum(row["killed"] == "random moment" for row in rows) < points and len(rows) < 3 * points:
        delay, place = span * float(torch.rand((), generator=rng)), len(rows)
        rows.append(point(folder, f"random{place}", epochs, every, delay, None, truth, place < fresh))
    faults: list[Fault] = [(name, which, when) for name, which in WRITES for when in ("half", "unnamed")][:writes]
    rows += [point(folder, f"write{i}", epochs, every, None, die, truth, False) for i, die in enumerate(faults)]
    about = {"steps": record["updates"], "seconds": span, "changed": record["changed_fraction"], "digest": truth}
    return rows, about


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = options(NAME, __doc__)
    parser.add_argument("--points", type=int, default=24, help="random moments that hit a working run")
    parser.add_argument("--writes", type=int, default=2 * len(WRITES), help="how many of the faults within a write")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--every", type=int, default=4, help="updates between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--fresh", type=int, default=3, help="runs that are resumed in a new interpreter")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows, about = measure(
            Path(folder), given.points, given.writes, given.epochs, given.every, given.seed, given.fresh
        )
    hit = [row for row in rows if row["killed"] != "(had ended)"]
    equal = sum(row["equal"] for row in rows)
    body = (
        f"The undisturbed run: {about['steps']} updates in {about['seconds']:.1f} s, a checkpoint every {given.every}, "
        f"{about['changed']:.0%} of the weights changed. Killed runs: {len(hit)}; equal to it by bytes: {equal} of {len(rows)}.\n\n"
        f"{table(rows)}"
    )
    publish(NAME, spelled(NAME, arguments), time.perf_counter() - begin, body, given.out or None)
    if equal < len(rows):
        raise SystemExit(f"{len(rows) - equal} resumed runs differ from the undisturbed one")
    return rows


if __name__ == "__main__":
    main()
