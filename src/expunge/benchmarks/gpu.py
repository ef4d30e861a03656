"""The ratios of `overhead` and `ensemble_speed` on a CUDA device, where there is one.

python -m expunge.benchmarks.gpu            # goals: loop <= 1.05 times a bare loop; 64 models >= 10x faster together
"""

from __future__ import annotations

import time
from typing import Any

import torch

from expunge.benchmarks import ensemble_speed, overhead
from expunge.benchmarks.measuring import options, publish, spelled, table

NAME = "gpu"


def loop_memory(rows: int, epochs: int) -> dict[str, Any]:
    """Peak memory that torch allocated on the device, of both loops."""
    case, _ = overhead.setup("resnet8", rows, epochs, "cuda")
    peak = {}
    for side, train in {"hand": overhead.by_hand, "loop": overhead.by_loop}.items():
        train(case)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        train(case)
        torch.cuda.synchronize()
        peak[side] = torch.cuda.max_memory_allocated() / 2**20
    return {**{f"{side}, MiB": value for side, value in peak.items()}, "memory ratio": peak["loop"] / peak["hand"]}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = options(NAME, __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=5120)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing measured; the CPU ratios are of overhead and ensemble_speed")
        return {}
    start = time.perf_counter()
    loop = overhead.measure("resnet8", given.rows, given.epochs, given.rounds, "cuda")
    memory = loop_memory(given.rows, given.epochs)
    together = [ensemble_speed.measure(kind, device="cuda") for kind in sorted(ensemble_speed.MODELS)]
    body = (
        f"The loop over a bare loop (goal: time and memory <= 1.05).\n\n{table([loop])}\n{table([memory])}\n"
        f"64 models together over one after another (goal: ratio >= 10).\n\n{table(together)}"
    )
    publish(NAME, spelled(NAME, arguments), time.perf_counter() - start, body, given.out or None)
    return {"loop": loop, "memory": memory, "ensemble": together}


if __name__ == "__main__":
    main()
