"""The ratios of `overhead`, `memory` and `ensemble_speed` on a CUDA device, where there is one, and what bf16 does to time and result.

    python -m expunge.benchmarks.gpu            # goals: loop <= 1.05 times a bare loop; 64 models >= 10x faster together;
                                                #        NPO's and SCRUB's peak memory <= 1.15 times fine-tuning's
    python -m expunge.benchmarks.gpu --parts loop ensemble

Times are wall times until the device has done its work; memory is the peak of what torch allocated there.
"""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import expunge
from expunge.benchmarks import ensemble_speed, memory, overhead, speed
from expunge.benchmarks.measuring import in_turns, options, publish, spelled, table
from expunge.cases import Case
from expunge.errors import ExpungeWarning

NAME = "gpu"
PARTS = ("loop", "memory", "ensemble", "bf16")
Row = dict[str, Any]


def finish(device: str) -> None:
    """Wait until the device has done its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_of(action: Callable[[], object]) -> float:
    """MiB that torch allocated on the device at most."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def loop_memory(kind: str, rows: int) -> Row:
    """Peak memory of both loops over one epoch."""
    case, _ = overhead.setup(kind, rows, 1, "cuda")
    sides = {"hand": overhead.by_hand, "loop": overhead.by_loop}
    peak = {}
    for side, train in sides.items():
        train(case)
        peak[side] = peak_of(partial(train, case))
    return {
        "model": kind,
        **{f"{side}, MiB": v for side, v in peak.items()},
        "memory ratio": peak["loop"] / peak["hand"],
    }


def loop(rows: int, epochs: int, rounds: int) -> str:
    """The loop over a bare loop: time and memory."""
    times = [overhead.measure(kind, rows, epochs, rounds, "cuda") for kind in overhead.PICTURES]
    space = [loop_memory(kind, rows) for kind in overhead.PICTURES]
    return f"The loop over a bare loop, {rounds} rounds in turns; goals: time and memory <= 1.05.\n\n{table(times)}\n{table(space)}"


def method_memory(rows: int = 300) -> str:
    """NPO's and SCRUB's peak memory over fine-tuning's, on the shapes of `memory`."""
    found = []
    for shape in memory.SHAPES:

        def peak(method: str, same: bool, shape: str = shape) -> float:
            return peak_of(lambda: memory.work(method, shape, rows, same, "cuda"))

        found += memory.measure(["npo", "scrub"], shape, peak)
    return f"Peak memory over fine_tune's; goal: NPO, SCRUB <= 1.15.\n\n{table(found)}"


def ensembles(epochs: int, repeats: int) -> str:
    """64 models together over one after another."""
    kinds = sorted(ensemble_speed.MODELS, reverse=True)
    rows = [ensemble_speed.measure(kind, epochs=epochs, repeats=repeats, device="cuda") for kind in kinds]
    return f"64 models together over one after another; goal: ratio >= 10.\n\n{table(rows)}"


def halves(case: Case, methods: list[str], rounds: int) -> list[Row]:
    """Each method in float32 (convolutions may use TF32, as torch has it by default) and with mixed_precision="bf16"."""
    device = next(case.model.parameters()).device.type
    found = []
    for name in methods:
        models: dict[str, torch.nn.Module] = {}

        def go(kind: str, name: str = name, models: dict[str, torch.nn.Module] = models) -> None:
            precision = "bf16" if kind == "bf16" else None
            models[kind] = expunge.unlearn(case, name, floor=None, device=device, mixed_precision=precision).model
            finish(device)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExpungeWarning)
            times = in_turns({kind: partial(go, kind) for kind in ("float32", "bf16")}, rounds, warm=False)
        row: Row = {"method": name, "float32, s": times.median("float32"), "bf16, s": times.median("bf16"),
                    "time ratio": times.ratio("bf16", "float32")}  # fmt: skip
        for split in ("forget", "retain", "test"):
            for kind, model in models.items():
                row[f"{split}, {kind}"] = case.task.evaluate(model, case.split(split).batches(1024))["accuracy"]
        print(f"{name}: {row['float32, s']:.1f} s, {row['bf16, s']:.1f} s in bf16", file=sys.stderr)
        found.append(row)
    return found


def bf16(rows: int, trained: int, methods: list[str], rounds: int, device: str = "cuda") -> str:
    """Time and accuracies in both precisions, on `speed`'s case."""
    found = halves(speed.setup(rows, trained, device), methods, rounds)
    return (
        f"float32 and bf16 on {rows} CIFAR-10 rows (forget class 3), original trained for {trained} epochs, methods with their "
        f"defaults; accuracies after.\n\n{table(found)}"
    )


def main(arguments: list[str] | None = None) -> dict[str, str]:
    parser = options(NAME, __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=5120, help="of the loops")
    parser.add_argument("--epochs", type=int, default=2, help="of the loops")
    parser.add_argument("--bf16-rows", type=int, default=10000)
    parser.add_argument("--bf16-trained", type=int, default=20, help="epochs of the original")
    parser.add_argument(
        "--methods", nargs="+", default=["fine_tune", "salun", "scrub", "l1_sparse", "npo"], help="of bf16"
    )
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing measured; the CPU ratios are of overhead, memory, ensemble_speed and speed")
        return {}
    torch.set_num_threads(1)
    start = time.perf_counter()
    parts: dict[str, Callable[[], str]] = {
        "loop": lambda: loop(given.rows, given.epochs, given.rounds),
        "memory": method_memory,
        "ensemble": lambda: ensembles(5, 3),
        "bf16": lambda: bf16(given.bf16_rows, given.bf16_trained, given.methods, 1),
    }
    found = {}
    for name in given.parts:
        found[name] = parts[name]()
        print(found[name], flush=True)
    publish(NAME, spelled(NAME, arguments), time.perf_counter() - start, "\n".join(found.values()), given.out or None)
    return found


if __name__ == "__main__":
    main()
