"""Measurements that a run asks for while it runs (by stops, floors and rewinds), each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from expunge.engine.workbench import Workbench
from expunge.errors import BadSetting
from expunge.parts.stops import Measure, Progress
from expunge.seeds import generator


class Measured:
    """The task's measurements of one network, on one fixed sample of at most `rows` rows of a split.

    Samples are a function of the workbench's seed and nested (the first 64 of a split are among its first 512), so two networks
    are compared on the very same rows. Results are kept until `clear()`: call it when the network has moved.
    """

    def __init__(self, bench: Workbench, network: Callable[[], nn.Module]):
        self.bench, self.network = bench, network
        self.known: dict[tuple[str, int], dict[str, float]] = {}

    def __call__(self, split: str, key: str, rows: int = 1000) -> float:
        """A measurement by name; "utility" is the task's own."""
        if split not in self.bench.splits:
            self.bench.case.split(split)  # raises the error that says how to get it
        sample = self.bench.splits[split]
        rows = min(rows, len(sample))
        if (split, rows) not in self.known:
            if rows < len(sample):
                sample = sample.sample(rows, generator(self.bench.seed, "measure", split))
            self.known[split, rows] = self.bench.evaluate(sample, self.network())
        return self.known[split, rows][self.bench.task.utility if key == "utility" else key]

    def clear(self) -> None:
        self.known.clear()


@dataclass(frozen=True)
class Curves:
    """What is measured while a method runs, before the first update and then every so many: `split.measurement`, such as
    "forget.loss", "retain.utility", "forget.probability". rows: of each split, one fixed sample."""

    every: int = 10
    of: tuple[str, ...] = ("forget.loss", "forget.utility", "retain.loss", "retain.utility")
    rows: int = 1000

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", tuple(self.of))
        odd = [name for name in self.of if name.count(".") != 1]
        if self.every < 1 or odd:
            raise BadSetting(
                f"expected every >= 1 and names such as forget.loss or retain.utility, found every={self.every} and "
                f"{', '.join(odd) or 'no odd name'}; correct them"
            )

    def measure(self, measured: Measure) -> dict[str, float]:
        """Name -> value, of the network as it is now."""
        return {name: float(measured(*name.split("."), rows=self.rows)) for name in self.of}


def of_original(bench: Workbench) -> Measured:
    """Measurements of the model that the request came with."""
    return Measured(bench, lambda: bench.original.to(bench.device))


def after_edit(bench: Workbench) -> Progress:
    """What a stop sees after a one-shot edit."""
    return Progress(0, 0, {}, Measured(bench, lambda: bench.model), of_original(bench))
