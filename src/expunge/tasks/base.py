"""A task is what a kind of model does: how a batch runs, its per-example loss, how two outputs differ, its utility.

Only a task knows its kind of model. Everything above (objectives, scopes, the loop, attacks, the verdict) speaks to a
model through the methods below, so a method written for classifiers runs on any kind whose task has them.

How other kinds fit without a change here:

* language: `loss` is the mean negative log-likelihood per token, `log_likelihood` the sum over the answer's tokens, and
  an example is many choices (`per_choice`), where a classifier's is one;
* diffusion: `prepare` draws noise and timestep into the batch (so that student and reference see the same), and
  `stochastic = True` tells the reference cache that a stored loss would be of another draw;
* graphs: a batch carries node ids and the graph as columns; ranking: `prepare` draws the negatives;
* policies: a batch carries states and actions, `log_likelihood` is the action's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import UnmetNeed

PerExample = Tensor
"""(B,) one number for each example of a batch."""

Measurements = dict[str, float]
"""Metric name -> value, lower snake case, over one split."""


@dataclass(frozen=True)
class Batch:
    """Some examples of a split.

    ids: (B,) int64, the examples' row numbers in the table they come from (what references are cached by).
    columns: name -> (B, ...) tensor, or any object shared by the whole batch (a graph, a codebook).
    """

    ids: Tensor
    columns: Mapping[str, Any]

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def with_columns(self, **columns: Any) -> Batch:
        """The same batch with some columns added or replaced."""
        return Batch(self.ids, {**self.columns, **columns})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in self.columns.items()}
        return Batch(self.ids, moved)


@dataclass(frozen=True)
class Output:
    """What a model said about a batch.

    prediction: (B, ...) logits, values, noises: whatever the task's loss reads.
    extra: further named tensors that some kinds return (router logits, hidden states).
    """

    prediction: Tensor
    extra: Mapping[str, Any] = field(default_factory=dict)

    def detach(self) -> Output:
        return Output(self.prediction.detach(), self.extra)

    def part(self, rows: slice, extra: Mapping[str, Any]) -> Output:
        """Some rows, with what else belongs to them."""
        return Output(self.prediction[rows], extra)

    def under(self, within: Callable[[], Any]) -> Output:
        """The same, where what is still to be computed of it must be computed inside this context."""
        return self


@dataclass(frozen=True)
class Readings:
    """What an audit reads of a batch, (B,) each: membership signals, the forget score, the loss.

    tokens: where an example is many choices, tables (B, L) of each of them, and which are real (`filled`)."""

    signals: dict[str, PerExample]
    forget_score: PerExample
    loss: PerExample
    tokens: dict[str, Tensor] | None = None


Choice = Callable[..., Tensor]
"""(logits (N, K), answers (N,)[, other logits (N, K)]) -> (N,) or (N, M): a pure function, each row for itself."""


class Task(ABC):
    """The contract between a kind of model and everything else. Subclasses are stateless settings."""

    name: str = ""
    stochastic: bool = False
    """True when `prepare` draws something the loss depends on, so that losses cannot be cached by example."""
    utility: str = ""
    """The key of `evaluate` that counts as the model's usefulness; higher is better."""
    input: str = "inputs"
    """The column that an adversary in input space perturbs."""
    labels: str = "labels"
    """The column of the true answers, where the kind has them as one."""
    ragged: bool = False
    """True when examples differ in length, so that their predictions do not stack into one table."""

    # -- running ---------------------------------------------------------------------------------------------------
    def columns(self, example: Any) -> dict[str, Any]:
        """One example of a map-style dataset -> named columns. Default: a mapping stays, a pair is (inputs, labels)."""
        if isinstance(example, Mapping):
            return dict(example)
        if isinstance(example, Sequence) and len(example) == 2:
            return {"inputs": example[0], "labels": example[1]}
        raise TypeError(
            f"expected an example to be a mapping or an (input, label) pair, found {type(example).__name__}; "
            f"pass a dataset of such examples or override {type(self).__name__}.columns"
        )

    def prepare(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Draw what the loss needs beyond the data (noise, timesteps, negatives). Default: nothing."""
        return batch

    @property
    def draws(self) -> bool:
        """Whether this kind's `prepare` does anything; where not, no generator is made for it."""
        return type(self).prepare is not Task.prepare

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """Run the model on a batch."""

    def constants(self, model: nn.Module, data: Any) -> dict[str, Any]:
        """What every batch carries beside its rows (the number of classes, the targets' spread); names start with `_`."""
        return {}

    # -- losses and distances --------------------------------------------------------------------------------------
    @abstractmethod
    def loss(self, output: Output, batch: Batch) -> PerExample:
        """(B,) in nats (or the kind's natural energy), lower is better fit."""

    def log_likelihood(self, output: Output, batch: Batch) -> PerExample:
        """(B,) log-likelihood of the true answer, up to a constant. Default: minus the loss."""
        return -self.loss(output, batch)

    @abstractmethod
    def divergence(self, output: Output, other: Output, batch: Batch, temperature: float = 1.0) -> PerExample:
        """(B,) how far `output` is from the target `other`: KL(other || output) for distributions, squared error for
        values and noises. `temperature` divides logits first; kinds without logits ignore it."""

    @property
    def relabelled(self) -> str:
        """The column that `relabel` replaces: the labels, or what a generative kind answers its condition with."""
        return self.labels

    @abstractmethod
    def relabel(self, batch: Batch, rng: torch.Generator, policy: str = "other") -> Batch:
        """Same inputs, an answer that is not theirs. `policy` names the kind's ways to draw it."""

    # -- choices: where a model picks one of K ---------------------------------------------------------------------
    def choices(self, batch: Batch) -> PerExample:
        """(B,) how many choices an example is made of: 1, or the number of its answer tokens."""
        columns = [v for v in batch.columns.values() if isinstance(v, Tensor)]  # row numbers stay on the CPU
        return torch.ones(len(batch), device=columns[0].device if columns else batch.ids.device)

    def per_choice(
        self, function: Choice, output: Output, batch: Batch, other: Output | None = None, reduce: str = "mean"
    ) -> Tensor:
        """(B,) a function of the logits and the true answer at every choice, reduced over each example's own choices.

        function: (logits (N, K), answers (N,)[, other's logits (N, K)]) -> (N,) or (N, M); pure and row by row, because
            a kind may evaluate it in pieces and again in the backward pass.
        reduce: `mean` or `sum` -> (B,) or (B, M); `none` -> (B, L) or (B, L, M), zero where an example has no choice.

        Losses written with it run on every kind that chooses among K: classifiers and language models alike.
        """
        raise UnmetNeed(
            f"expected a kind of model that chooses among K answers (logits), found {self.name}, which does not; "
            "use an objective on its loss or its divergence instead"
        )

    def spots(self, batch: Batch) -> Tensor | None:
        """(B, T) bool, the positions of an activation (B, T, d) that carry the answer; None: activations are (B, d)."""
        return None

    def real(self, batch: Batch) -> Tensor | None:
        """(B, T) bool, the positions of an activation (B, T, d) that are not padding; None: activations are (B, d)."""
        return None

    def joined(self, batches: Sequence[Batch]) -> Batch:
        """Several batches as one (a mixed batch is one forward). Columns with one entry per row are stacked."""
        first, size = batches[0], len(batches[0])
        columns = {}
        for name, value in first.columns.items():
            per_row = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
            columns[name] = torch.cat([b[name] for b in batches]) if per_row else value
        return Batch(torch.cat([b.ids for b in batches]), columns)

    # -- measuring -------------------------------------------------------------------------------------------------
    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Measurements:
        """Utility that people use for this kind, plus `loss` (mean) and `n`. The model is left in the mode it was."""

    @abstractmethod
    def forget_score(self, output: Output, batch: Batch) -> PerExample:
        """(B,) higher means the model knows this example better; the verdict's m(.)."""

    @abstractmethod
    def signals(self, output: Output, batch: Batch) -> dict[str, PerExample]:
        """Membership signals, each (B,) and oriented so that higher means more likely a member. Always has `loss`
        (the negated loss) and `margin` (an unbounded, roughly Gaussian score for LiRA)."""

    def readings(self, output: Output, batch: Batch) -> Readings:
        """What an audit reads of a batch; a kind whose numbers come from one table makes that table once."""
        return Readings(self.signals(output, batch), self.forget_score(output, batch), self.loss(output, batch))

    def labelled(self, names: Sequence[str]) -> bool:
        """Whether a table of these columns has the true answers (for generative kinds: the conditions)."""
        return self.labels in names

    def answers(self, batch: Batch) -> Tensor | None:
        """(B,) the true answers, where the kind has them as one column."""
        value = batch.columns.get(self.labels)
        return value if isinstance(value, Tensor) else None

    # -- checks ----------------------------------------------------------------------------------------------------
    def problems(self, model: nn.Module, batch: Batch) -> list[str]:
        """Everything that keeps this model and this batch from working together, each a three-beat sentence."""
        return []


def move_to_model(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the device of the model's first parameter."""
    first = next(model.parameters(), None)
    return batch if first is None else batch.to(first.device)


class evaluating:
    """Context: the model in eval mode without gradients; leaves every submodule in the mode it was."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> nn.Module:
        self.modes = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        self.grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        return self.model

    def __exit__(self, *_: object) -> None:
        torch.set_grad_enabled(self.grad)
        for module, training in self.modes:
            module.training = training


@contextmanager
def held_still(module: nn.Module) -> Iterator[None]:
    """Within it no gradient reaches the module's weights, and none is computed for them; its inputs' gradients pass."""
    moving = [p for p in module.parameters() if p.requires_grad]
    for p in moving:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in moving:
            p.requires_grad_(True)
