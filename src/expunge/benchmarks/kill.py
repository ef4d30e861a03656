"""kill -9 at random moments and in the middle of writing: a run resumed has the tensors of one that nobody disturbed.

    python -m expunge.benchmarks.kill                        # 24 random moments + 10 while files are written; about 3 minutes
    python -m expunge.benchmarks.kill --points 60

Every point is a run directory of its own: a fresh process runs `unlearn(case, "salun", run=directory, checkpoint_steps=4)`, is
killed with SIGKILL, and is started again until it ends; the weights it saves are compared with the undisturbed run's by their
bytes. The network has dropout and batch norm, and the optimizer momentum, so draws, statistics and state must all come back.

Random moments are drawn uniformly over the time that an undisturbed run works (imports excluded). Moments within a write are met
by a fault inside the worker: it kills itself with half of the bytes of a checkpoint (model, outcome) written, or with the file
whole but not yet renamed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
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
from expunge.parts.plan import Optimizer, Training
from expunge.seeds import generator

NAME = "kill"
WRITES = (
    ("checkpoint.safetensors", 1), ("checkpoint.safetensors", 7), ("checkpoint.safetensors", 20), ("model.safetensors", 1),
    ("outcome.json", 1),
)  # fmt: skip
"""(file, which writing of it) that the worker dies in."""


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


def work(folder: Path, run: str, epochs: int, every: int, die: str | None) -> None:
    """The worker: tells its steps on stdout as it goes, unbuffered; what it told is all that is left of it."""
    case = setup(folder / "original.safetensors")
    if die:
        die_while_writing(*json.loads(die))

    def report(_text: str, done: int, _total: int) -> None:
        os.write(1, b"%d\n" % done)

    os.write(1, b"0\n")
    expunge.unlearn(
        case, "salun", run=folder / run, checkpoint_steps=every, epochs=epochs, batch_size=64, floor=0.1, report=report
    )


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


def start(folder: Path, run: str, epochs: int, every: int, die: str | None = None) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", f"expunge.benchmarks.{NAME}", "--worker", str(folder), "--run", run, "--epochs", str(epochs),
        "--every", str(every), *(["--die", die] if die else []),
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=(folder / f"{run}.log").open("wb"))


def finish(process: subprocess.Popen[bytes], folder: Path, run: str) -> None:
    process.communicate()
    if process.returncode:
        log = (folder / f"{run}.log").read_text(errors="replace")
        raise RuntimeError(
            f"expected the run {run} to end well, found exit status {process.returncode}:\n{log[-2000:]}"
        )


def saved_step(folder: Path, run: str) -> int:
    """The step of the checkpoint that the next start goes on from; 0 without one."""
    file = folder / run / "checkpoint.safetensors"
    if not file.exists():
        return 0
    with safe_open(str(file), framework="pt") as opened:
        return json.loads(opened.metadata()["position"])["step"]


def last_step(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    told = process.stdout.read().split()
    return int(told[-1]) if told else 0


def point(
    folder: Path, run: str, epochs: int, every: int, delay: float | None, die: str | None, truth: str
) -> dict[str, Any]:
    """Kill one run once (again and again it would only be sooner done), start it again, compare."""
    process = start(folder, run, epochs, every, die)
    if delay is not None:
        assert process.stdout is not None
        process.stdout.readline()  # "0": imports are done, work begins
        time.sleep(delay)
        process.kill()
    step = last_step(process)
    process.wait()
    killed = process.returncode == -signal.SIGKILL
    resumed, parts = saved_step(folder, run), len(list((folder / run).rglob(".*.part")))
    where = "random moment" if die is None else "{}, writing {}, {}".format(*json.loads(die))
    if killed:
        finish(start(folder, run, epochs, every), folder, run)
    return {
        "killed": where if killed else "(had ended)", "at step": step, "went on from step": resumed, "half-written files": parts,
        "equal": digest_weights(folder / run / "model" / "model.safetensors") == truth,
    }  # fmt: skip


def measure(
    folder: Path, points: int, writes: int, epochs: int, every: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row per killed run, and what the undisturbed run was."""
    setup(folder / "original.safetensors")
    process = start(folder, "undisturbed", epochs, every)
    assert process.stdout is not None
    process.stdout.readline()
    began = time.perf_counter()
    finish(process, folder, "undisturbed")
    span = time.perf_counter() - began
    truth = digest_weights(folder / "undisturbed" / "model" / "model.safetensors")
    record = json.loads((folder / "undisturbed" / "outcome.json").read_text())["record"]
    rows, rng = [], generator(seed, "kill")
    while sum(row["killed"] == "random moment" for row in rows) < points and len(rows) < 3 * points:
        delay = span * float(torch.rand((), generator=rng))
        rows.append(point(folder, f"random{len(rows)}", epochs, every, delay, None, truth))
    faults = [json.dumps([name, which, when]) for name, which in WRITES for when in ("half", "unnamed")][:writes]
    rows += [point(folder, f"write{i}", epochs, every, None, die, truth) for i, die in enumerate(faults)]
    about = {"steps": record["updates"], "seconds": span, "changed": record["changed_fraction"], "digest": truth}
    return rows, about


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = options(NAME, __doc__)
    parser.add_argument("--points", type=int, default=24, help="random moments that hit a working run")
    parser.add_argument("--writes", type=int, default=2 * len(WRITES), help="how many of the faults within a write")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--every", type=int, default=4, help="updates between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--worker", type=Path, help="internal: run in this folder")
    parser.add_argument("--run", help="internal: the run directory's name")
    parser.add_argument("--die", help="internal: [file, which writing, half or unnamed]")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.worker:
        work(given.worker, given.run, given.epochs, given.every, given.die)
        return []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows, about = measure(Path(folder), given.points, given.writes, given.epochs, given.every, given.seed)
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
