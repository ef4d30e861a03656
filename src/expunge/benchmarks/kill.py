"""kill -9 at random moments: a run that dies and is started again must end at the tensors of one that did not.

    python -m expunge.benchmarks.kill                 # 20 points; about 5 minutes
    python -m expunge.benchmarks.kill --points 4

A worker process runs `unlearn(case, "salun", run=folder)` with frequent checkpoints and is killed by SIGKILL a random few
milliseconds after a random update (so also in the middle of writing a checkpoint); it is started again until it ends. The
final weights are compared byte for byte with those of an undisturbed run, and metrics.jsonl line by line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from expunge.benchmarks.measuring import options, publish, spelled, table
from expunge.files import digest_weights
from expunge.seeds import numpy_generator

UPDATES = 300
SETTINGS: dict[str, Any] = {"epochs": 15, "batch_size": 32, "lr": 0.02}
"""15 epochs of 2 forget and 18 retain batches: 300 updates."""


def worker(folder: str, die_after: int, delay: float) -> None:
    """Run the case in `folder`; after `die_after` updates of this process wait `delay` seconds and die. 0: never."""
    import torch

    from expunge.benchmarks.testbed import mlp
    from expunge.benchmarks.testbed import digits as load
    from expunge.cases import Case, requests
    from expunge.methods.outcome import unlearn
    from expunge.seeds import derive

    torch.set_num_threads(1)
    x, y, x_test, y_test = load(640)
    torch.manual_seed(derive(0, "kill"))
    model = mlp(64, (128, 64), 10)
    case = Case(model, (x.flatten(1), y), requests.samples(range(64)), test=(x_test.flatten(1), y_test))
    updates = [0]

    def count(*_: Any) -> None:
        updates[0] += 1
        if die_after and updates[0] == die_after:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    unlearn(case, "salun", seed=1, run=folder, floor=None, checkpoint_steps=5, report=count, **SETTINGS)


def start(folder: Path, die_after: int = 0, delay: float = 0.0) -> int:
    """A worker in a process of its own; its exit status, -9 where it was killed."""
    command = [sys.executable, "-m", "expunge.benchmarks.kill", "--worker", str(folder), str(die_after), str(delay)]
    return subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def one_point(folder: Path, number: int, expected: tuple[str, list[str]], seed: int) -> dict[str, Any]:
    """Kill at random until the run ends; whether it ended at the expected weights and metrics."""
    rng, deaths = numpy_generator(seed, "kill", number), []
    die_after = int(rng.integers(1, UPDATES))
    while die_after:
        status = start(folder, die_after, float(rng.uniform(0, 0.02)))
        if status == 0:
            break
        assert status == -signal.SIGKILL, f"expected the worker to be killed or to end, found exit status {status}"
        deaths.append(die_after)
        die_after = int(rng.integers(1, UPDATES)) if len(deaths) < 2 else 0
    if not deaths or status != 0:
        status = start(folder)
    weights, lines = outcome(folder)
    return {
        "point": number + 1, "killed after updates": ", ".join(map(str, deaths)) or "(had ended)",
        "same weights": weights == expected[0], "same metrics": lines == expected[1],
    }  # fmt: skip


def outcome(folder: Path) -> tuple[str, list[str]]:
    """Digest of the final weights, and the lines of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return digest_weights(folder / "model" / "model.safetensors"), lines


def run(points: int, seed: int = 0) -> list[dict[str, Any]]:
    """All points; each row says whether the resumed run equals the undisturbed one."""
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder) / "undisturbed"
        if start(undisturbed) != 0:
            raise RuntimeError(
                "expected the undisturbed run to end well, found that it did not; run the worker by hand"
            )
        expected = outcome(undisturbed)
        rows = []
        for number in range(points):
            rows.append(one_point(Path(folder) / f"point{number}", number, expected, seed))
            print(f"{number + 1}/{points} {rows[-1]}", file=sys.stderr)
        return rows


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--worker"]:
        worker(given[1], int(given[2]), float(given[3]))
        return
    parser = options("kill", __doc__)
    parser.add_argument("--points", type=int, default=20)
    chosen = parser.parse_args(given)
    began = time.perf_counter()
    rows = run(chosen.points)
    equal = sum(row["same weights"] and row["same metrics"] for row in rows)
    deaths = sum(row["killed after updates"].count(",") + 1 for row in rows if row["killed after updates"][0] != "(")
    body = f"{equal} of {len(rows)} runs, killed {deaths} times in all, ended at the undisturbed run's bytes.\n\n{table(rows)}"
    publish("kill", spelled("kill", arguments), time.perf_counter() - began, body, chosen.out or None)
    if equal < len(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
