"""What the one loop costs over the loop that a person would write by hand for one recipe.

Both train the same fresh model on the same batches (the same row numbers, taken by index from tensors in memory) with SGD and
momentum, and must end at equal weights: the arithmetic is the same, so the difference in time is the engine's.

    python -m expunge.benchmarks.overhead                    # ResNet8 on CIFAR-10 rows; goals: time and memory <= 1.05
    python -m expunge.benchmarks.overhead --rounds 15

Two sizes: `resnet8` on CIFAR-10 rows (EXPUNGE_DATA; random pixels of that shape if there are none, and the table says so), where
an update takes tens of milliseconds, and `mlp` on scikit-learn's digits, where one takes a fraction of a millisecond and the
engine's fixed cost per update shows: it is given in microseconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from expunge.benchmarks.measuring import Times, clock_of, in_process, in_turns, options, publish, spelled, table
from expunge.benchmarks.testbed import ResNet8, ResNet18, cifar, digits, mlp
from expunge.cases import Case, TensorData, requests
from expunge.engine.execute import peak_memory_mb
from expunge.engine.loop import run_plan
from expunge.engine.workbench import Workbench
from expunge.errors import ExpungeError
from expunge.parts.plan import Optimizer, Training
from expunge.seeds import derive, generator

SEED = 0
NAME = "overhead"
PICTURES: dict[str, Callable[[], nn.Module]] = {"resnet8": ResNet8, "resnet18": ResNet18}


def cifar_rows(count: int) -> tuple[Tensor, Tensor, str]:
    """(N, 3, 32, 32) standardised, (N,) labels, and what they are."""
    try:
        x, y, _, _ = cifar(count, 10)
        return x, y, "CIFAR-10 rows"
    except (ExpungeError, OSError):
        rng = generator(SEED, "pixels")
        x, y = torch.randn(count, 3, 32, 32, generator=rng), torch.randint(0, 10, (count,), generator=rng)
        return x, y, "random pixels of CIFAR-10's shape (no CIFAR-10 found by EXPUNGE_DATA)"


def digit_mlp() -> nn.Module:
    return mlp(64, (128, 64), 10)


def setup(kind: str, rows: int, epochs: int, device: str = "cpu") -> tuple[Case, str]:
    """A case whose recipe is to be timed, and what its data is."""
    if kind in PICTURES:
        (x, y, told), build, batch = cifar_rows(rows), PICTURES[kind], 128
    else:
        x, y, _, _ = digits(rows)
        x, told, build, batch = x.flatten(1), "digits", digit_mlp, 64
    recipe = Training(
        epochs=epochs, batch_size=batch, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)
    )
    data = TensorData(inputs=x.to(device), labels=y)
    return Case(build().to(device), data, requests.samples([0]), recipe=recipe, build=build), told


def by_loop(case: Case) -> nn.Module:
    """Train a fresh model by the engine."""
    model = case.fresh(SEED)
    bench = Workbench(case, model, SEED, next(model.parameters()).device)
    run_plan(case.recipe.plan(on="train"), bench)
    return bench.model


def by_hand(case: Case) -> nn.Module:
    """The bare PyTorch loop of the same arithmetic; nothing of the engine runs inside."""
    model, training = case.fresh(SEED), case.recipe
    X, spec = case.data.column("inputs"), training.optimizer
    y = case.data.column("labels").to(X.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, foreach=True
    )
    losses = []
    model.train()
    for epoch in range(training.epochs):
        order = torch.randperm(len(X), generator=generator(derive(SEED, "phase", 0), "order", epoch, "train", 0))
        for index in order.split(training.batch_size):
            index = index.to(X.device)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X[index]), y[index])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model


def difference(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of two models' weights and buffers."""
    theirs = b.state_dict()
    return max(float((v.double() - theirs[k].double()).abs().max()) for k, v in a.state_dict().items())


def measure(kind: str, rows: int, epochs: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """One row of the table: times and their ratio over interleaved rounds, on one case."""
    case, told = setup(kind, rows, epochs, device)
    models: dict[str, nn.Module] = {}

    def timed(name: str, train: Callable[[Case], nn.Module]) -> Callable[[], None]:
        def action() -> None:
            models[name] = train(case)
            if device.startswith("cuda"):
                torch.cuda.synchronize()

        return action

    times: Times = in_turns(
        {"loop": timed("loop", by_loop), "hand": timed("hand", by_hand)}, rounds, clock=clock_of(device)
    )
    if device.startswith("cuda"):  # equal weights can only be asked of kernels that sum in a fixed order
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=True):
            models = {"loop": by_loop(case), "hand": by_hand(case)}
    updates = epochs * -(-rows // case.recipe.batch_size)
    low, high = times.range("loop", "hand")
    return {
        "model": kind, "data": told, "device": device, "updates": updates,
        "by hand, ms/update": 1e3 * times.median("hand") / updates,
        "loop, ms/update": 1e3 * times.median("loop") / updates,
        "time ratio": times.ratio("loop", "hand"), "range": f"{low:.3f}..{high:.3f}",
        "engine, µs/update": 1e6 * (times.best("loop") - times.best("hand")) / updates,
        "largest weight difference": difference(models["loop"], models["hand"]),
    }  # fmt: skip


def memory(kind: str, rows: int, epochs: int, repeats: int = 3) -> dict[str, Any]:
    """Peak memory of both, each in processes of its own (the least of `repeats`), and of one that only builds the case."""
    shared = ("--kind", kind, "--rows", str(rows), "--epochs", str(epochs))
    peak = {
        side: min(
            in_process(f"expunge.benchmarks.{NAME}", "--worker", side, *shared)["peak_mb"] for _ in range(repeats)
        )
        for side in ("idle", "hand", "loop")
    }
    return {
        "model": kind, **{f"{side}, MiB": value for side, value in peak.items()},
        "memory ratio": peak["loop"] / peak["hand"],
        "ratio net of idle": (peak["loop"] - peak["idle"]) / max(peak["hand"] - peak["idle"], 1e-9),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    parser = options(NAME, __doc__)
    parser.add_argument("--kinds", nargs="+", choices=("resnet8", "mlp"), default=["resnet8", "mlp"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=1280)
    parser.add_argument("--epochs", type=int, default=2, help="of resnet8; the mlp runs ten times as many")
    parser.add_argument(
        "--worker", choices=("idle", "hand", "loop"), help="internal: run one side, print its peak memory"
    )
    parser.add_argument("--kind", default="resnet8", help="internal: the model of a worker")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.worker:
        case, _ = setup(given.kind, given.rows, given.epochs)
        if given.worker != "idle":
            {"hand": by_hand, "loop": by_loop}[given.worker](case)
        print(json.dumps({"peak_mb": peak_memory_mb()}))
        return {}
    start = time.perf_counter()
    plans = [(kind, given.rows, given.epochs if kind == "resnet8" else 10 * given.epochs) for kind in given.kinds]
    speed = [measure(*plan, given.rounds) for plan in plans]
    space = [memory(*plan) for plan in plans]
    body = (
        f"Processor time, median of {given.rounds} rounds in turns; goal for resnet8: ratio <= 1.05.\n\n{table(speed)}\n"
        f"Peak memory of a process of its own (idle: imports and builds the case); goal: ratio <= 1.05.\n\n{table(space)}"
    )
    publish(NAME, spelled(NAME, arguments), time.perf_counter() - start, body, given.out or None)
    return {"time": speed, "memory": space}


if __name__ == "__main__":
    main()
