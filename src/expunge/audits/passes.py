"""One run of one model over one split: what every check reads of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from expunge.errors import UnmetNeed
from expunge.seeds import generator
from expunge.tasks.base import Batch, Output, Readings, Task, evaluating, move_to_model

if TYPE_CHECKING:
    from expunge.cases.data import Split


@dataclass(frozen=True)
class Pass:
    """What one model said about one split, n examples in the order of the split. Arrays are float64 on the CPU.

    predictions: (n, ...) or None where a kind's predictions are not one row per example of at most one dimension.
    tokens: name -> for each example an array over its choices, where it is many (see `Language.statistics`).
    utility: the task's `evaluate`.
    """

    ids: np.ndarray
    signals: dict[str, np.ndarray]
    forget_score: np.ndarray
    loss: np.ndarray
    answers: np.ndarray | None
    predictions: np.ndarray | None
    utility: dict[str, float]
    tokens: dict[str, list[np.ndarray]] | None = None

    def at(self, places: np.ndarray) -> Pass:
        """The same pass with its examples in another order."""
        moved = {name: getattr(self, name) for name in ("ids", "forget_score", "loss", "answers", "predictions")}
        moved = {name: None if values is None else values[places] for name, values in moved.items()}
        tokens = None
        if self.tokens is not None:
            tokens = {name: [rows[place] for place in places.tolist()] for name, rows in self.tokens.items()}
        signals = {name: values[places] for name, values in self.signals.items()}
        return replace(self, signals=signals, tokens=tokens, **moved)


TEXTS, TEXTS_ON_A_GPU = 64, 256
"""Texts in a batch at most: padding grows with a batch, and so does the memory of its activations."""


def texts_at_once(model: nn.Module) -> int:
    """Texts in a batch of a forward pass; a GPU waits for launches where there are too few."""
    first = next(model.parameters(), None)
    return TEXTS if first is None or first.device.type == "cpu" else TEXTS_ON_A_GPU


def by_length(split: Split) -> torch.Tensor:
    """Positions of the split, the longest text first (what does not fit into memory fails at once); else in order."""
    lengths = getattr(split.data, "lengths", None)
    if lengths is None:
        return torch.arange(len(split))
    return torch.tensor([lengths[i] for i in split.ids.tolist()]).argsort(descending=True, stable=True)


def run_pass(task: Task, model: nn.Module, split: Split, seed: int, batch_size: int) -> Pass:
    """One forward of the model over the split, in eval mode and without augmentation; texts of like length together."""
    if not task.ragged or not len(split):
        return _run(task, model, split, seed, batch_size)
    order = by_length(split)
    return _run(task, model, split.subset(order), seed, min(batch_size, texts_at_once(model))).at(
        order.argsort().numpy()
    )


def run_losses(task: Task, model: nn.Module, split: Split) -> np.ndarray:
    """(n,) the task's losses alone, of texts of like length together; for tables of which nothing else is asked."""
    order, found = by_length(split), np.empty(len(split))
    with evaluating(model):
        for places in order.split(texts_at_once(model)):
            batch = move_to_model(split.data.fetch(split.ids[places]), model)
            found[places.numpy()] = _array(task.loss(task.forward(model, batch), batch))
    return found


def _run(task: Task, model: nn.Module, split: Split, seed: int, batch_size: int) -> Pass:
    """One forward of the model over the split, in eval mode and without augmentation.

    What a stochastic task draws comes from the audit's seed, the split and the batch, so all models see the same draws.
    """
    replay = _Replay(task)
    parts: list[dict[str, Any]] = []

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(split.batches(batch_size)):
            batch = task.prepare(batch, generator(seed, "audit", split.name, number))
            batch = move_to_model(batch, model)
            output = task.forward(model, batch)
            readings = task.readings(output, batch)
            parts.append(_read(task, output, batch, readings))
            replay.hold(batch, output, readings.signals)
            yield batch

    with evaluating(model):
        running = batches()
        utility = replay.task.evaluate(model, running)
        for _ in running:
            pass  # an evaluation that stops early must not shorten the signals
    return _join(parts, utility, split.name)


def _read(task: Task, output: Output, batch: Batch, readings: Readings) -> dict[str, Any]:
    answers = task.answers(batch)
    return {
        "ids": batch.ids.cpu().numpy(),
        "signals": {name: _array(value) for name, value in readings.signals.items()},
        "forget_score": _array(readings.forget_score),
        "loss": _array(readings.loss),
        "answers": None if answers is None else answers.detach().cpu().numpy(),
        "predictions": _predictions(task, output, len(batch)),
        "tokens": None if readings.tokens is None else _own_tokens(readings.tokens),
    }


def _own_tokens(table: dict[str, torch.Tensor]) -> dict[str, list[np.ndarray]]:
    """Tables (B, L) as one array for each example, without what is not real."""
    filled = table["filled"].cpu().numpy()
    return {
        name: [row[own] for row, own in zip(_array(values), filled, strict=True)]
        for name, values in table.items()
        if name != "filled"
    }


def _predictions(task: Task, output: Output, count: int) -> np.ndarray | None:
    if task.ragged:
        return None  # a text's logits are never asked for as a whole
    rows = output.prediction
    if rows.dim() not in (1, 2) or rows.shape[0] != count:
        return None
    return _array(rows.double().softmax(-1) if task.name == "classification" else rows)


class _Replay:
    """A copy of the task whose `forward` hands back the output just computed for the very batch it is asked about, and
    whose `signals` those of that output.

    A batch that the task changed before its forward (other columns) is run for real.
    """

    def __init__(self, task: Any):
        self.task = copy.copy(task)
        self.batch: Batch | None = None
        self.output: Output | None = None
        self.signals: dict[str, torch.Tensor] = {}
        true_forward, true_signals = task.forward, task.signals

        def forward(model: nn.Module, batch: Batch) -> Output:
            held = self.batch
            same = (
                held is not None
                and held.ids is batch.ids
                and held.columns.keys() == batch.columns.keys()
                and all(held.columns[name] is batch.columns[name] for name in held.columns)
            )
            return self.output if same else true_forward(model, batch)

        def signals(output: Output, batch: Batch) -> dict[str, torch.Tensor]:
            return self.signals if output is self.output else true_signals(output, batch)

        object.__setattr__(self.task, "forward", forward)
        object.__setattr__(self.task, "signals", signals)

    def hold(self, batch: Batch, output: Output, signals: dict[str, torch.Tensor]) -> None:
        self.batch, self.output, self.signals = batch, output, signals


def _array(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


def _join(parts: list[dict[str, Any]], utility: Mapping[str, float], split: str) -> Pass:
    if not parts:
        raise UnmetNeed(f"expected examples in the {split} split, found none; audit a request and data that fill it")

    def joined(name: str) -> np.ndarray | None:
        return None if parts[0][name] is None else np.concatenate([part[name] for part in parts])

    names, tokens = parts[0]["signals"], None
    if parts[0]["tokens"] is not None:
        tokens = {name: [row for part in parts for row in part["tokens"][name]] for name in parts[0]["tokens"]}
    return Pass(
        ids=np.concatenate([part["ids"] for part in parts]),
        signals={name: np.concatenate([part["signals"][name] for part in parts]) for name in names},
        forget_score=np.concatenate([part["forget_score"] for part in parts]),
        loss=np.concatenate([part["loss"] for part in parts]),
        answers=joined("answers"),
        predictions=joined("predictions"),
        utility=dict(utility),
        tokens=tokens,
    )
