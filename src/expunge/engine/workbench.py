"""What a method works with: the model under change, the splits, the references, and the few measurements that scopes and
edits are made of. One workbench per run; everything drawn in it comes from its seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.cases.case import Case
from expunge.cases.data import Split
from expunge.errors import ExpungeWarning
from expunge.parts.references import References
from expunge.parts.scalars import Scalars
from expunge.parts.step import Step
from expunge.seeds import derive, generator
from expunge.tasks.base import Batch, Task, evaluating

if TYPE_CHECKING:
    from expunge.parts.objectives.base import Objective


@dataclass(eq=False)
class Workbench:
    """model: the working copy, changed in place. networks: all networks of the run by name ("model" is the working copy).
    device: where the model is. notes: what the method wants in its record. warnings: what the report must say.
    previous: for a stream of requests, what the method kept from the last one (explicit state)."""

    case: Case
    model: nn.Module
    seed: int = 0
    device: torch.device = torch.device("cpu")
    references: References = None  # type: ignore[assignment]
    networks: dict[str, nn.Module] = field(default_factory=dict)
    splits: dict[str, Split] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    report: Callable[[str, int, int], None] | None = None
    original: nn.Module = None  # type: ignore[assignment]
    """The model that the request came with, never changed: the case's own, unless that is the working copy."""
    scalars: Scalars | None = None
    """Where references keep their numbers between runs."""
    phase: int = 0
    """Which phase of a plan is at work; in the first, the working copy is still the original."""

    def __post_init__(self) -> None:
        self.original = self.case.model if self.original is None else self.original
        self.networks.setdefault("model", self.model)
        self.splits = {**self.case.splits, **self.splits}
        if self.references is None:
            case, seed = self.case, self.seed
            self.references = References(
                case.task,
                self.device,
                {"original": lambda: self.original, "random": lambda: case.fresh(derive(seed, "random teacher"))},
                steady=self.original is not self.model,
                scalars=self.scalars,
            )
        self._constants = self.task.constants(self.model, self.case.data)

    @property
    def task(self) -> Task:
        return self.case.task

    def fill(self, batch: Batch) -> Batch:
        """The batch on the model's device, with the task's constants."""
        batch = batch.to(self.device)
        return batch.with_columns(**self._constants) if self._constants else batch

    def batches(
        self, split: str | Split, batch_size: int = 256, shuffled: bool = False, purpose: str = "batches"
    ) -> Iterator[Batch]:
        """Batches of a split on the device, in order or in one shuffled order of the workbench's seed; no augmentation."""
        rows = self.splits[split] if isinstance(split, str) else split
        source = (
            rows.shuffled(generator(self.seed, purpose, rows.name), batch_size)
            if shuffled
            else rows.batches(batch_size)
        )
        for batch in source:
            yield self.fill(batch)

    def step(self, batch: Batch, split: str = "forget", objective: Objective | None = None) -> Step:
        """A step outside the loop: what scopes and edits evaluate objectives on."""
        return Step(
            self.model, self.task, batch, self.references, partial(generator, self.seed, "workbench", split),
            split=split, layers=tuple(objective.layers) if objective is not None else (), networks=self.networks,
        )  # fmt: skip

    def loss(self, batch: Batch, split: str = "forget", objective: Objective | None = None, number: int = 0) -> Tensor:
        """(B,) the task's loss, or an objective's, of the model on a batch, with gradient. number: of the batch in its pass."""
        batch = self.task.prepare(batch, generator(self.seed, "prepare", split, number))
        step = self.step(batch, split, objective)
        return step.loss if objective is None else objective(step)

    def gradient(
        self, on: str, objective: Objective | None = None, batch_size: int = 256, reduction: str = "sum_of_means",
        clip: float | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Gradient over a split in eval mode. `sum_of_means`: sum over batches of the gradient of the batch mean (SalUn's
        mask); `mean`: the gradient of the mean over the whole split. clip: largest norm of each batch's part. Frozen parameters
        are left out. What a stochastic task draws is another for each batch."""
        names, parameters = self._trainable()
        total = [torch.zeros_like(p) for p in parameters]
        with _modes(self.model, training=False):
            for number, batch in enumerate(self.batches(on, batch_size)):
                loss = self.loss(batch, on, objective, number)
                value = loss.mean() if reduction == "sum_of_means" else loss.sum() / len(self.splits[on])
                found = _grad(value, parameters)
                size = 1.0 if clip is None else float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found))))
                scale = 1.0 if clip is None else min(1.0, clip / (size + 1e-6))
                for t, g in zip(total, found, strict=True):
                    t.add_(g, alpha=scale)
        return dict(zip(names, total, strict=True))

    def importance(
        self,
        on: str | Split,
        batch_size: int = 64,
        power: int = 2,
        shuffled: bool = False,
        energy: Callable[[Step], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """(1/B) sum over batches |grad of the batch mean|^power, eval mode: SSD's importance, NOT a per-example Fisher (the
        batch size matters: mean gradients shrink with it). energy: another (B,) function of the step than the loss."""
        names, parameters = self._trainable()
        # half precision squares to zero: sums are kept in float32 there
        kind = {p: torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype for p in parameters}
        total, count = [torch.zeros_like(p, dtype=kind[p]) for p in parameters], 0
        split, rows = (on, self.splits[on]) if isinstance(on, str) else (on.name, on)
        with _modes(self.model, training=False):
            for batch in self.batches(on, batch_size, shuffled=shuffled, purpose="importance"):
                self.progress(f"gradients of {split}", count * batch_size, len(rows))
                if self.task.draws:
                    batch = self.task.prepare(batch, generator(self.seed, "prepare", split, count))
                step = self.step(batch, split)
                value = (step.loss if energy is None else energy(step)).mean()
                found = torch.autograd.grad(value, parameters, allow_unused=True)
                pairs = [(t, g.to(t.dtype)) for t, g in zip(total, found, strict=True) if g is not None]
                sums, gradients = [t for t, _ in pairs], [g for _, g in pairs]
                # Squared out of place: autograd may hand one tensor to two parameters. Not addcmul, whose fused rounding
                # would differ from the published code's in the last bit.
                size = torch._foreach_abs(gradients) if power == 1 else torch._foreach_mul(gradients, gradients)
                torch._foreach_add_(sums, size)
                count += 1
        torch._foreach_div_(total, float(max(count, 1)))
        return dict(zip(names, total, strict=True))

    def evaluate(self, split: str | Split, model: nn.Module | None = None, batch_size: int = 512) -> dict[str, float]:
        """The task's measurements of the working model (or another) on a split."""
        return self.task.evaluate(model or self.model, self.batches(split, batch_size))

    def note(self, key: str, value: Any) -> None:
        """Keep a number in the run's record."""
        self.notes[key] = value

    def warn(self, message: str, category: type[ExpungeWarning] = ExpungeWarning) -> None:
        """Warn the caller, and keep the warning for the report."""
        self.warnings.append(f"{category.__name__}: {message}")
        warnings.warn(message, category, stacklevel=3)

    def progress(self, text: str, done: int, total: int) -> None:
        """Tell whoever shows progress (a bar of the command line)."""
        if self.report is not None:
            self.report(text, done, total)

    def _trainable(self) -> tuple[list[str], list[Tensor]]:
        pairs = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        return [n for n, _ in pairs], [p for _, p in pairs]


class _modes(evaluating):
    """Eval (or train) mode with gradients on; leaves every submodule in the mode it was."""

    def __init__(self, model: nn.Module, training: bool):
        super().__init__(model)
        self.training = training

    def __enter__(self) -> nn.Module:
        super().__enter__()
        torch.set_grad_enabled(True)
        self.model.train(self.training)
        return self.model


def _grad(value: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
