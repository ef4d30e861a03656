"""Peak memory of methods that compare with the original, over fine-tuning's, where scalars can stand for a second model.

    python -m expunge.benchmarks.memory                     # MLPs of about 30 million parameters; goal: NPO, SCRUB <= 1.15
    python -m expunge.benchmarks.memory --shapes 2x1000 --methods npo

Every method runs by `unlearn` with its own defaults but one epoch, in a process of its own, `--repeats` times; the least peak
counts. Each ratio is given twice: of the whole process, and net of an idle process that imports the same and builds the case. A
frozen copy of the original would show as one more times the weights. The optimizer matters as much as the method (momentum is a
copy of the weights, Adam two), so all are also run with fine-tuning's. `control` is fine-tuning with a frozen copy of the original
in memory: what the ratio would be if scalars did not suffice.

Shapes are hidden layers x width. A step over two splits (NPO) makes the gradient of one layer twice before it is summed, so
where one layer holds nearly all the weights, as in 2x5400, it pays for that layer once more, with scalars or without; a network
of many layers hardly notices.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import expunge
from expunge.benchmarks.measuring import in_process, options, publish, spelled, table
from expunge.benchmarks.testbed import digits, mlp
from expunge.cases import Case, TensorData, requests
from expunge.engine.execute import peak_memory_mb
from expunge.methods.registry import find
from expunge.parts.plan import Optimizer, Plan, Training

NAME = "memory"
BASE, CONTROL = "fine_tune", "control"
SHAPES = ("10x1750", "2x5400")


def build_of(shape: str) -> partial[nn.Sequential]:
    """ "2x5400" -> a maker of an MLP 64-5400-5400-10."""
    depth, width = map(int, shape.split("x"))
    return partial(mlp, 64, (width,) * depth, 10)


def setup(shape: str, rows: int, device: str = "cpu") -> Case:
    """An MLP on digits, untrained: memory does not depend on what it knows."""
    x, y, x_test, y_test = digits(rows)
    build = build_of(shape)
    torch.manual_seed(0)
    return Case(build().to(device), TensorData(inputs=x.flatten(1), labels=y), requests.label(3), recipe=Training(epochs=1), build=build,
                test=TensorData(inputs=x_test.flatten(1), labels=y_test))  # fmt: skip


def same_optimizer(plan: Plan) -> Plan:
    """The plan moved by fine-tuning's kind of optimizer: SGD with momentum."""
    chosen = Optimizer("sgd", lr=1e-4, momentum=0.9)
    terms = tuple(replace(term, optimizer=None) for term in plan.terms)
    return plan.with_(optimizer=chosen, terms=terms)


def work(method: str, shape: str, rows: int, same: bool, device: str = "cpu") -> None:
    """What a worker does: build the case and run the method on it; "idle" only builds."""
    case = setup(shape, rows, device)
    if method == "idle":
        return
    frozen = copy.deepcopy(case.model) if method == CONTROL else None
    configured = find(BASE if method == CONTROL else method).configure(epochs=1)
    action = configured.action(case)
    assert isinstance(action, Plan)
    expunge.unlearn(case, same_optimizer(action) if same else configured, floor=None)
    del frozen


def measure(methods: list[str], shape: str, peak: Callable[[str, bool], float]) -> list[dict[str, Any]]:
    """One row per method: with fine-tuning's optimizer, and with its own. peak: (method, whether with fine-tuning's) -> MiB."""
    weights = sum(p.numel() for p in build_of(shape)().parameters()) * 4 / 2**20
    idle, base = peak("idle", False), peak(BASE, True)
    found = []
    for same in (True, False):
        for method in [BASE, *methods, *([CONTROL] if same else [])]:
            whole = peak(method, same)
            found.append({
                "shape": shape, "method": method, "optimizer": "fine_tune's" if same else "its own", "weights, MiB": weights,
                "idle, MiB": idle, "peak, MiB": whole, "ratio": whole / base, "ratio net of idle": (whole - idle) / (base - idle),
            })  # fmt: skip
    return found


def in_processes(shape: str, rows: int, repeats: int) -> Callable[[str, bool], float]:
    """Peak resident memory of a process of its own, the least of `repeats`."""

    def peak(method: str, same: bool) -> float:
        shared = ("--worker", method, "--shapes", shape, "--rows", str(rows), *(["--same"] if same else []))
        return min(in_process(f"expunge.benchmarks.{NAME}", *shared)["peak_mb"] for _ in range(repeats))

    return peak


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = options(NAME, __doc__)
    parser.add_argument("--methods", nargs="+", default=["npo", "scrub"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="hidden layers x width")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--worker", help="internal: run one method (or 'idle'), print the peak")
    parser.add_argument("--same", action="store_true", help="internal: with fine-tuning's optimizer")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.worker:
        work(given.worker, given.shapes[0], given.rows, given.same)
        print(json.dumps({"peak_mb": peak_memory_mb()}))
        return []
    start = time.perf_counter()
    rows = [
        row
        for shape in given.shapes
        for row in measure(given.methods, shape, in_processes(shape, given.rows, given.repeats))
    ]
    body = f"Peak resident memory of a process of its own, over fine_tune's; goal: ratio <= 1.15.\n\n{table(rows)}"
    publish(NAME, spelled(NAME, arguments), time.perf_counter() - start, body, given.out or None)
    return rows


if __name__ == "__main__":
    main()
