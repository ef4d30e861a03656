"""Frozen models that objectives compare with, at the least cost that serves.

An objective declares how much of a reference it reads: `loss` or `log_likelihood` (one scalar per example),
`output` (the prediction) or `features` (activations, or the weights themselves). In the order of what they cost:

1. numbers: for all but features, and a task whose loss is a function of the example alone, the reference is run once over
   the split before the first step and only its numbers are kept (on disk where a folder is given, see `scalars`);
2. the model under training with its adapters off (`lend`), where a low-rank scope trains nothing else;
3. a view: frozen parameters on the memory of a module that nobody changes while the run lasts;
4. a frozen copy, where the module is elsewhere or is itself being changed.

Drawn noise, augmented or perturbed inputs and features need one of the last three.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expunge.cases.data import Split
from expunge.errors import UnmetNeed
from expunge.parts.scalars import Scalars
from expunge.parts.step import capturing
from expunge.tasks.base import Batch, Output, PerExample, Task, evaluating, move_to_model

LARGEST_CACHED_PREDICTION = 4096
"""Numbers per example above which predictions are not cached (a frozen copy is smaller than the table)."""


@dataclass
class References:
    """The frozen models of one run, by name: `original`, `random`, and whatever a phase has trained.

    make: name -> function that returns the module, which is copied only where its numbers do not suffice.
    steady: whether these modules stay as they are while the run lasts, so that a view of their weights is a frozen copy.
    scalars: where numbers are kept between runs; None: in memory only.
    """

    task: Task
    device: torch.device | str = "cpu"
    make: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)
    steady: bool = False
    scalars: Scalars | None = None
    _models: dict[str, nn.Module] = field(default_factory=dict)
    _lent: dict[str, nn.Module] = field(default_factory=dict)
    _standing: nn.Module | None = None
    _losses: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _likelihoods: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _outputs: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    fresh_inputs: bool = False
    """True while inputs differ from the table's (augmentation, an input adversary): the caches do not apply."""

    def model(self, name: str) -> nn.Module:
        """The frozen module; made on first use."""
        if name not in self._models:
            freeze = frozen_view if self.steady else frozen_copy
            self._models[name] = freeze(self._source(name)).to(self.device)
        return self._models[name]

    def lend(self, name: str, adapted: nn.Module) -> None:
        """Until `give_back`, what `name` says is what this network says with its adapters off."""
        if name not in self._models:
            self._lent[name] = adapted

    def give_back(self) -> None:
        """The adapters are about to be merged: nothing is lent any more."""
        self._lent.clear()

    @contextmanager
    def running(self, name: str):
        """A network that now says what `name` says: `with references.running("original") as model: ...` (no gradient)."""
        with torch.no_grad():
            if name in self._lent:
                with evaluating(self._lent[name]) as model, adapters_off(model):
                    yield model
            else:
                yield self.model(name)

    @contextmanager
    def _once(self, name: str):
        """As `running`, for one pass over a split: where a copy must be made, it does not outlive the pass."""
        if name in self._lent or name in self._models:
            with self.running(name) as model:
                yield model
            return
        source = self._at_rest(name)
        with evaluating(
            source if _device(source) == torch.device(self.device) else frozen_copy(source).to(self.device)
        ) as model:
            yield model

    def _at_rest(self, name: str) -> nn.Module:
        """The module behind a name while the caches are filled."""
        return self._standing if name == "original" and self._standing is not None else self._source(name)

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
        self, needs: Mapping[str, Mapping[str, set[str]]], splits: Mapping[str, Split], batch_size: int = 512,
        original: nn.Module | None = None,
    ) -> None:  # fmt: skip
        """Fill the caches. needs: reference name -> split name -> {"loss", "log_likelihood", "output", "features"}.
        original: a network that still is the original, to be asked instead."""
        self._standing = original
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
        self._standing = None

    def _fill(self, key: tuple[str, str], split: Split, wanted: set[str], batch_size: int) -> None:
        store = None if key[0] in self._lent else self.scalars  # a lent network's weights are not the reference's alone
        mark = store.mark(self._at_rest(key[0]), split, self.task) if store is not None else ""
        found = store.read(mark) if store is not None else None
        if found is None or ("output" in wanted and "output" not in found and not self.task.ragged):
            found = self._run(key[0], split, wanted, batch_size)
            if store is not None:
                found = store.write(mark, found)
        for name, table in (("loss", self._losses), ("log_likelihood", self._likelihoods), ("output", self._outputs)):
            if name in found:
                table[key] = found[name]

    def _run(self, name: str, split: Split, wanted: set[str], batch_size: int) -> dict[str, Tensor]:
        """Tables over row numbers: `loss` and `log_likelihood` (rows,), and where wanted and not too large, `output`."""
        rows = int(split.ids.max()) + 1
        found: dict[str, Tensor] = {}

        def keep(what: str, ids: Tensor, values: Tensor) -> None:
            if what not in found:
                found[what] = values.new_full((rows, *values.shape[1:]), float("nan"))
            found[what][ids] = values.detach()

        with self._once(name) as model:
            for batch in split.by_length(batch_size):
                batch = move_to_model(batch, model)
                output = self.task.forward(model, batch)
                keep("loss", batch.ids, self.task.loss(output, batch))
                keep("log_likelihood", batch.ids, self.task.log_likelihood(output, batch))
                if "output" in wanted and not self.task.ragged:
                    prediction = output.prediction
                    if prediction[0].numel() > LARGEST_CACHED_PREDICTION or output.extra:
                        wanted = wanted - {"output"}
                    else:
                        keep("output", batch.ids, prediction)
        return found

    def loss(self, name: str, batch: Batch, split: str) -> PerExample:
        cached = self._losses.get((name, split))
        if cached is not None and not self.fresh_inputs:
            return cached[batch.ids].to(self.device)
        with self.running(name) as model:
            return self.task.loss(self.task.forward(model, batch), batch)

    def log_likelihood(self, name: str, batch: Batch, split: str) -> PerExample:
        cached = self._likelihoods.get((name, split))
        if cached is not None and not self.fresh_inputs:
            return cached[batch.ids].to(self.device)
        with self.running(name) as model:
            return self.task.log_likelihood(self.task.forward(model, batch), batch)

    def output(self, name: str, batch: Batch, split: str) -> Output:
        cached = self._outputs.get((name, split))
        if cached is not None and not self.fresh_inputs:
            return Output(cached[batch.ids].to(self.device))
        return self.fresh(name, batch)

    def fresh(self, name: str, batch: Batch) -> Output:
        """What a frozen model says about any batch, relabelled ones too: caches know only the splits' own rows."""
        with self.running(name) as model:
            output = self.task.forward(model, batch)
            return output.under(partial(adapters_off, model)) if name in self._lent else output

    def features(self, name: str, batch: Batch, layers: tuple[str, ...]) -> dict[str, Tensor]:
        with self.running(name) as model, capturing(model, layers) as seen:
            self.task.forward(model, batch)
        return dict(seen)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model that no gradient reaches."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def frozen_view(model: nn.Module) -> nn.Module:
    """Modules of its own on the parameters' own memory: a frozen copy for as long as nobody changes the model."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared).eval()


@contextmanager
def adapters_off(model: nn.Module):
    """peft's adapters add nothing inside; which of them are active and trained is left as it was."""
    # not peft's own enable/disable, which also decides what is trained
    layers = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    before = [m._disable_adapters for m in layers]
    for m in layers:
        m._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for m, was in zip(layers, before, strict=True):
            m._disable_adapters = was  # type: ignore[assignment]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def collect_needs(terms: Any) -> dict[str, dict[str, set[str]]]:
    """reference name -> split -> what is read of it, over all terms of a plan."""
    needs: dict[str, dict[str, set[str]]] = {}
    for term in terms:
        for name, what in term.objective.reads:
            needs.setdefault(name, {}).setdefault(term.on, set()).add(what)
    return needs
