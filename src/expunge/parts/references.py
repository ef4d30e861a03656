"""Frozen models that objectives compare with, at the least cost that serves.

An objective declares how much of a reference it reads: `loss` or `log_likelihood` (one scalar per example),
`output` (the prediction) or `features` (activations, or the weights themselves). For all but features, and a task
whose loss is a function of the example alone, the reference is run once over the split before the first step and only its
numbers are kept: no second model in memory. Features, drawn noise, augmented or perturbed inputs need a frozen copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge.cases.data import Split
from expunge.errors import UnmetNeed
from expunge.parts.step import capturing
from expunge.tasks.base import Batch, Output, PerExample, Task, evaluating, move_to_model

LARGEST_CACHED_PREDICTION = 4096
"""Numbers per example above which predictions are not cached (a frozen copy is smaller than the table)."""


@dataclass
class References:
    """The frozen models of one run, by name: `original`, `random`, and whatever a phase has trained.

    make: name -> function that returns the module, which is copied only where its numbers do not suffice.
    """

    task: Task
    device: torch.device | str = "cpu"
    make: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)
    _models: dict[str, nn.Module] = field(default_factory=dict)
    _losses: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _likelihoods: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _outputs: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    fresh_inputs: bool = False
    """True while inputs differ from the table's (augmentation, an input adversary): the caches do not apply."""

    def model(self, name: str) -> nn.Module:
        """The frozen module; made on first use."""
        if name not in self._models:
            self._models[name] = frozen_copy(self._source(name)).to(self.device)
        return self._models[name]

    def _source(self, name: str) -> nn.Module:
        """The module behind a name, not copied."""
        if name in self._models:
            return self._models[name]
        if name not in self.make:
            known = ", ".join(sorted({*self.make, *self._models})) or "none"
            raise UnmetNeed(
                f"expected a reference model '{name}', found {known}; name one of these or add a phase that trains it"
            )
        return self.make[name]()

    def add(self, name: str, model: nn.Module) -> None:
        """Freeze a trained network and make it available under `name`."""
        self._models[name] = model.eval().requires_grad_(False)

    def prepare(
        self, needs: Mapping[str, Mapping[str, set[str]]], splits: Mapping[str, Split], batch_size: int = 512
    ) -> None:
        """Fill the caches. needs: reference name -> split name -> {"loss", "log_likelihood", "output", "features"}."""
        if self.task.stochastic or self.fresh_inputs:
            return
        for name, by_split in needs.items():
            for split_name, wanted in by_split.items():
                key, split = (name, split_name), splits.get(split_name)
                if split is None or "features" in wanted or not len(split):
                    continue
                if key in self._losses and ("output" not in wanted or key in self._outputs):
                    continue
                self._fill(key, split, wanted, batch_size)

    def _fill(self, key: tuple[str, str], split: Split, wanted: set[str], batch_size: int) -> None:
        name = key[0]
        model = self._source(name)
        if next(model.parameters()).device != torch.device(self.device):
            model = frozen_copy(model).to(self.device)
        rows = int(split.ids.max()) + 1
        with evaluating(model):
            losses: Any = None
            likelihoods: Any = None
            outputs: Any = None
            for batch in split.batches(batch_size):
                batch = move_to_model(batch, model)
                output = self.task.forward(model, batch)
                loss = self.task.loss(output, batch)
                if losses is None:
                    losses = torch.full((rows,), float("nan"), dtype=loss.dtype, device=loss.device)
                    likelihoods = losses.clone()
                losses[batch.ids] = loss
                likelihoods[batch.ids] = self.task.log_likelihood(output, batch)
                if "output" in wanted:
                    prediction = output.prediction
                    if prediction[0].numel() > LARGEST_CACHED_PREDICTION or output.extra:
                        wanted = wanted - {"output"}
                        outputs = None
                        continue
                    if outputs is None:
                        outputs = prediction.new_zeros((rows, *prediction.shape[1:]))
                    outputs[batch.ids] = prediction
        if losses is not None:
            self._losses[key], self._likelihoods[key] = losses, likelihoods
        if outputs is not None:
            self._outputs[key] = outputs

    def loss(self, name: str, batch: Batch, split: str) -> PerExample:
        cached = self._losses.get((name, split))
        if cached is not None and not self.fresh_inputs:
            return cached[batch.ids].to(self.device)
        with torch.no_grad():
            return self.task.loss(self.task.forward(self.model(name), batch), batch)

    def log_likelihood(self, name: str, batch: Batch, split: str) -> PerExample:
        cached = self._likelihoods.get((name, split))
        if cached is not None and not self.fresh_inputs:
            return cached[batch.ids].to(self.device)
        with torch.no_grad():
            return self.task.log_likelihood(self.task.forward(self.model(name), batch), batch)

    def output(self, name: str, batch: Batch, split: str) -> Output:
        cached = self._outputs.get((name, split))
        if cached is not None and not self.fresh_inputs:
            return Output(cached[batch.ids].to(self.device))
        with torch.no_grad():
            return self.task.forward(self.model(name), batch)

    def features(self, name: str, batch: Batch, layers: tuple[str, ...]) -> dict[str, Tensor]:
        model = self.model(name)
        with torch.no_grad(), capturing(model, layers) as seen:
            self.task.forward(model, batch)
        return dict(seen)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model that no gradient reaches."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def collect_needs(terms: Any) -> dict[str, dict[str, set[str]]]:
    """reference name -> split -> what is read of it, over all terms of a plan."""
    needs: dict[str, dict[str, set[str]]] = {}
    for term in terms:
        for name, what in term.objective.reads:
            needs.setdefault(name, {}).setdefault(term.on, set()).add(what)
    return needs
