"""kill -9 at random moments and in the middle of writing: a run resumed has the tensors of one that nobody disturbed.

    python -m expunge.benchmarks.kill                        # 24 random moments + 10 while files are written; about 2 minutes
    python -m expunge.benchmarks.kill --points 60

Every point is a run directory of its own: a process runs `unlearn(case, "salun", run=directory, checkpoint_steps=4)`, is
killed with SIGKILL, and is started again until it ends; the weights it saves are compared with the undisturbed run's by their
bytes. Processes are forks of a clean server that has only imported (a start costs nothing then); some are resumed in a new
interpreter instead. The network has dropout and batch norm, and the optimizer momentum, so draws, statistics and state must all
come back.

Random moments: a random update is awaited, then a random part of an update's time, so that load on the machine does not make them
cluster. Moments within a write are met
by a fault inside the worker: it kills itself with half of the bytes of a checkpoint (model, outcome) written, or with the file
whole but not yet renamed.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from expunge.benchmarks.kill_worker import Fault, setup, work
from expunge.benchmarks.measuring import options, publish, spelled, table
from expunge.files import digest_weights
from expunge.seeds import generator

NAME = "kill"
MOST_STARTS = 4
WRITES = (
    ("checkpoint.safetensors", 1), ("checkpoint.safetensors", 7), ("checkpoint.safetensors", 20), ("model.safetensors", 1),
    ("outcome.json", 1),
)  # fmt: skip
"""(file, which writing of it) that the worker dies in."""


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


def saved_step(folder: Path, run: str) -> int:
    """The step of the checkpoint that the next start goes on from; 0 without one."""
    file = folder / run / "checkpoint.safetensors"
    if not file.exists():
        return 0
    with safe_open(str(file), framework="pt") as opened:
        return json.loads(opened.metadata()["position"])["step"]


def point(
    folder: Path, run: str, epochs: int, every: int, moment: tuple[int, float] | None, die: Fault | None, truth: str, fresh: bool
) -> dict[str, Any]:  # fmt: skip
    """Kill one run once, start it again, compare. moment: (update to wait for, seconds to wait then). fresh: start it again in
    a new interpreter, else in a fork of the clean server."""
    server = multiprocessing.get_context("forkserver")
    worker = Worker.start(server, folder, run, epochs, every, die)
    if moment is not None:
        while not worker.steps or worker.steps[-1] < moment[0]:
            worker.steps.append(worker.told.recv())
        time.sleep(moment[1])
        worker.process.kill()
    killed = worker.wait() == -signal.SIGKILL
    resumed, parts = saved_step(folder, run), len(list((folder / run).rglob(".*.part")))
    where = "random moment" if die is None else f"{die[0]}, writing {die[1]}, {die[2]}"
    starts = 1
    while killed and not (folder / run / "outcome.json").exists():
        if starts == MOST_STARTS:
            raise RuntimeError(
                f"expected the run {run} to end after a kill ({where}), found {starts} starts in vain; see above"
            )
        Worker.start(multiprocessing.get_context("spawn") if fresh else server, folder, run, epochs, every).wait()
        starts += 1
    return {
        "killed": where if killed else "(had ended)", "at step": worker.steps[-1] if worker.steps else 0,
        "went on from step": resumed, "half-written files": parts, "starts": starts, "in": "new interpreter" if fresh else "fork",
        "equal": digest_weights(folder / run / "model" / "model.safetensors") == truth,
    }  # fmt: skip


def measure(
    folder: Path, points: int, writes: int, epochs: int, every: int, seed: int, fresh: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """One row per killed run, and what the undisturbed run was."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["expunge.benchmarks.kill_worker"])
    setup(folder / "original.safetensors")
    worker = Worker.start(server, folder, "undisturbed", epochs, every)
    worker.told.recv()
    began = time.perf_counter()
    if status := worker.wait():
        raise RuntimeError(f"expected the undisturbed run to end well, found exit status {status}; its error is above")
    span = time.perf_counter() - began
    truth = digest_weights(folder / "undisturbed" / "model" / "model.safetensors")
    record = json.loads((folder / "undisturbed" / "outcome.json").read_text())["record"]
    rows, rng = [], generator(seed, "kill")
    while sum(row["killed"] == "random moment" for row in rows) < points and len(rows) < 3 * points:
        update, part, place = torch.rand((), generator=rng), torch.rand((), generator=rng), len(rows)
        moment = int(update * record["updates"]), float(part) * span / record["updates"]
        rows.append(point(folder, f"random{place}", epochs, every, moment, None, truth, place < fresh))
    faults: list[Fault] = [(name, which, when) for name, which in WRITES for when in ("half", "unnamed")][:writes]
    rows += [point(folder, f"write{i}", epochs, every, None, die, truth, False) for i, die in enumerate(faults)]
    about = {"steps": record["updates"], "seconds": span, "changed": record["changed_fraction"], "digest": truth}
    return rows, about


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = options(NAME, __doc__)
    parser.add_argument("--points", type=int, default=24, help="random moments that hit a working run")
    parser.add_argument("--writes", type=int, default=2 * len(WRITES), help="how many of the faults within a write")
    parser.add_argument("--epochs", type=int, default=10)
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
