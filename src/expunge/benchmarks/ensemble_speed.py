"""How much faster models train together than one after another, on scikit-learn's real digits.

The same 64 shadow models (random halves of 1000 digits, batch 64, SGD with momentum) are trained twice in one process
on one torch thread: by a bare PyTorch loop, one model after another, and by `Ensemble.train`. Both times (of the processor,
on CPU) are the best of `--repeats`, taken in turns so that other load on the machine meets both. Final weights are compared: a fast wrong
answer does not count.

    python -m expunge.benchmarks.ensemble_speed                  # MLP 64-64-10 (goal: ratio >= 2.5 on CPU), a small conv net
    python -m expunge.benchmarks.ensemble_speed --model mlp
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from expunge.benchmarks.measuring import clock_of, options, publish, spelled, table
from expunge.cases.data import TensorData
from expunge.engine.ensemble import Ensemble, fresh_model
from expunge.engine.stacked_training import member_batches
from expunge.parts.plan import Optimizer, Training
from expunge.tasks.classification import Classification


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": conv}


def one_after_another(
    build: Callable[[], nn.Module], data: TensorData, members: list[Tensor], training: Training, device: str
) -> list[nn.Module]:
    """The bare loop a person would write, on the ensemble's batches; nothing of the engine runs inside."""
    X, y = data.column("inputs"), data.column("labels")
    models = []
    for seed, rows in enumerate(members):
        model = fresh_model(build, seed).to(device)
        spec = training.optimizer
        optimizer = torch.optim.SGD(model.parameters(), lr=spec.lr, momentum=spec.momentum)
        for index in member_batches(rows, training, seed):
            index = index.to(device)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[index]), y[index]).backward()
            optimizer.step()
        models.append(model)
    return models


def measure(
    kind: str = "mlp",
    models: int = 64,
    epochs: int = 10,
    repeats: int = 3,
    device: str = "cpu",
    chunk: int | None = None,
) -> dict[str, Any]:
    """One row: {model, models, device, sequential_s, vectorised_s, ratio, largest_difference}; seconds of processor
    time on CPU, of wall time elsewhere."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels[:1000] / 16, dtype=torch.float32, device=device)
    data = TensorData(inputs=inputs, labels=torch.tensor(labels[:1000], device=device))
    rng = torch.Generator().manual_seed(0)
    members = [torch.randperm(1000, generator=rng)[:500] for _ in range(models)]
    training = Training(epochs=epochs, batch_size=64, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9))
    build, clock = MODELS[kind], clock_of(device)

    def together() -> Ensemble:
        return Ensemble.train(
            lambda: build().to(device), Classification(), data, members, training, range(models), chunk
        )  # fmt: skip

    def timed(action: Callable[[], Any]) -> tuple[float, Any]:
        start = clock()
        result = action()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return clock() - start, result

    together()  # the first call pays for torch.func's own set-up
    sequential, vectorised = [], []
    for _ in range(repeats):
        seconds, apart = timed(lambda: one_after_another(build, data, members, training, device))
        sequential.append(seconds)
        seconds, ensemble = timed(together)
        vectorised.append(seconds)
    difference = max(
        float((p.detach() - ensemble.parameters[name][i]).abs().max())
        for i, model in enumerate(apart)
        for name, p in model.named_parameters()
    )
    return {
        "model": kind,
        "models": models,
        "device": device,
        "epochs": epochs,
        "sequential_s": round(min(sequential), 3),
        "vectorised_s": round(min(vectorised), 3),
        "ratio": round(min(sequential) / min(vectorised), 2),
        "largest_difference": difference,
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = options("ensemble_speed", __doc__)
    parser.add_argument("--model", choices=sorted(MODELS), nargs="+", default=sorted(MODELS, reverse=True))
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = [measure(m, given.models, given.epochs, given.repeats, given.device, given.chunk) for m in given.model]
    command = spelled("ensemble_speed", arguments)
    publish("ensemble_speed", command, time.perf_counter() - began, table(rows), given.out or None)
    return rows


if __name__ == "__main__":
    main()
