"""A case is one request against one model. It checks everything before any compute and resolves into splits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from expunge.cases import requests
from expunge.cases.data import Data, Split, as_data, check_finite
from expunge.errors import BadData, BadModel, BadRequest, nearest
from expunge.seeds import derive
from expunge.seeds import generator as make_generator
from expunge.tasks import Task
from expunge.tasks import task as make_task

if TYPE_CHECKING:
    import numpy as np

    from expunge.parts.plan import Training

SPLITS = ("forget", "retain", "holdout", "test", "train")


class Exam(Protocol):
    """Forget scores and utility of a generative model from what it draws, (n,) each in [0, 1], in one order for every model."""

    def recalled(self, model: Any) -> np.ndarray: ...

    def useful(self, model: Any) -> np.ndarray: ...


@dataclass
class Case:
    """One request against one model.

    Args:
        model: the trained model (`original`); never changed, methods work on a copy.
        data: the training data, anything `as_data` takes. Row numbers are the examples' identity.
        request: `requests.samples(...)`, `.label(...)`, `.where(...)`, or their YAML form.
        task: a name or a `Task`.
        test: data never seen in training.
        holdout: data never seen but of the forget kind. Default: the test rows of the request's kind where the request
            defines one (a class, a predicate); else a random half of `test`.
        recipe: how `retrained` is trained (`Training(...)`): needed by gold, retraining methods and ensembles.
        build: makes a fresh untrained model; default: a copy of `model` with every layer's parameters reset.
        augment: batch, generator -> batch; used in training, never in audits.
        probes: further tables that checks read by name (paraphrases, wrong answers, general knowledge, ...).
        exam: what a generative model is asked and who judges its answers (`audits.metrics.exam.Exam`); where there is one, the
            verdict's forget score and utility are read off the model's own images.
        seed: of the case itself (how `test` is halved). Training, unlearning and auditing take their own.
    """

    model: nn.Module
    data: Data
    request: requests.Request
    task: Task = "classification"  # type: ignore[assignment]
    test: Data | None = None
    holdout: Data | None = None
    recipe: Training | None = None
    build: Callable[[], nn.Module] | None = None
    augment: Callable[..., Any] | None = None
    probes: Mapping[str, Data] = field(default_factory=dict)
    exam: Exam | None = None
    name: str = "case"
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.task = make_task(self.task)
        reader = self.task.columns
        self.data = as_data(self.data, columns=reader)
        self.test = None if self.test is None else as_data(self.test, columns=reader)
        self.holdout = None if self.holdout is None else as_data(self.holdout, columns=reader)
        self.request = requests.from_settings(self.request)
        if not isinstance(self.model, nn.Module):
            raise BadModel(
                f"expected a torch.nn.Module, found {type(self.model).__name__}; load it first with expunge.load_model(...)"
            )
        self.check()

    # -- checks ----------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raise one clear error if the request, the data and the model do not fit together."""
        rows = self.request.rows(self.data)
        if len(rows) == len(self.data):
            raise BadRequest(
                f"expected some data to keep, found that the request takes all {len(self.data)} rows; "
                "to forget everything, train a new model instead"
            )
        for name, data in (("training", self.data), ("test", self.test), ("holdout", self.holdout)):
            if data is not None:
                check_finite(data, name)
        self._check_overlap()
        self._check_twins(rows)
        probe = self._probe()
        problems = self.task.problems(self.model, probe)
        if problems:
            raise BadModel("; ".join(problems)) if _about_model(problems) else BadData("; ".join(problems))

    def _probe(self):
        """A small batch with the extreme labels in it, so that one forward finds labels outside the model's range."""
        ids = self.data.telling_rows()
        labels = getattr(self.task, "labels", None)
        if labels in self.data.names:
            values = self.data.column(labels)
            if isinstance(values, Tensor) and values.dim() == 1 and len(values) and not self.task.ragged:
                ids = torch.cat([ids, values.argmin()[None], values.argmax()[None]]).unique()
        return self.data.fetch(ids)

    def _check_overlap(self) -> None:
        """Unseen data must be unseen. Rows of one content are found by their digests."""
        if self.test is None and self.holdout is None:
            return
        seen = set(self.train_digests)
        for name, data in (("test", self.test), ("holdout", self.holdout)):
            if data is None:
                continue
            shared = [i for i, digest in enumerate(data.row_digests(torch.arange(len(data)))) if digest in seen]
            if not shared:
                continue
            if name == "holdout" or len(shared) == len(data):
                raise BadData(
                    f"expected {name} data that the model never saw, found {len(shared)} rows that are also in the training "
                    f"data (first: {shared[:5]}); remove them, or membership would be measured against members"
                )
            self.notes[f"{name}_rows_also_in_training"] = len(shared)

    def _check_twins(self, forget: Tensor) -> None:
        """A text that is both to go and to stay would be learned again by every method with a retain term."""
        if not self.task.ragged or not len(forget):
            return
        taken = set(forget.tolist())
        gone = {self.train_digests[i] for i in taken}
        twins = [i for i, digest in enumerate(self.train_digests) if i not in taken and digest in gone]
        if twins:
            raise BadRequest(
                f"expected the forgotten texts to be gone from the kept ones, found {len(twins)} kept rows with the very same "
                f"text (rows {twins[:5]}); add them to the request, or remove them from the data"
            )

    @cached_property
    def train_digests(self) -> list[str]:
        return self.data.row_digests(torch.arange(len(self.data)))

    # -- splits ----------------------------------------------------------------------------------------------------
    @cached_property
    def splits(self) -> dict[str, Split]:
        """forget, retain, train always; test and holdout where there is unseen data."""
        everything = torch.arange(len(self.data))
        forget = self.request.rows(self.data)
        keep = torch.ones(len(self.data), dtype=torch.bool)
        keep[forget] = False
        splits = {
            "forget": Split("forget", self.data, forget, self.augment),
            "retain": Split("retain", self.data, everything[keep], self.augment),
            "train": Split("train", self.data, everything, self.augment),
        }
        if self.holdout is not None:
            splits["holdout"] = Split("holdout", self.holdout, torch.arange(len(self.holdout)))
        if self.test is not None:
            rows = torch.arange(len(self.test))
            kind = self.request.kind(self.test)
            if kind is not None and "holdout" not in splits and bool(kind.any()):
                splits["holdout"] = Split("holdout", self.test, rows[kind])
            if kind is not None:
                rows = rows[~kind]
            elif "holdout" not in splits:
                order = rows[torch.randperm(len(rows), generator=make_generator(self.seed, "case", "halves"))]
                half = len(order) // 2
                splits["holdout"] = Split("holdout", self.test, order[:half].sort().values)
                rows = order[half:].sort().values
            splits["test"] = Split("test", self.test, rows)
        return splits

    def split(self, name: str) -> Split:
        """The split of this name; an error says which there are and how to get the missing one."""
        if name in self.splits:
            return self.splits[name]
        if name in SPLITS:
            raise BadData(
                f"expected the case to have a '{name}' split, found none; pass Case(..., {name}=data never seen)"
            )
        raise BadData(f"expected a split, one of {', '.join(SPLITS)}, found '{name}'.{nearest(name, SPLITS)}")

    def probe(self, name: str) -> Data:
        """A probe table by name; an error says which there are."""
        if name not in self.probes:
            raise BadData(
                f"expected the case to have a probe '{name}', found {', '.join(self.probes) or 'none'}; "
                f"pass Case(probes={{'{name}': data}}).{nearest(name, self.probes)}"
            )
        return self.probes[name]

    def with_(self, **changes: Any) -> Case:
        """The same case with some fields replaced (splits are resolved anew)."""
        return replace(self, **changes)

    # -- models ----------------------------------------------------------------------------------------------------
    def fresh(self, seed: int) -> nn.Module:
        """An untrained model; equal seeds give equal tensors. Global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "fresh"))
            model = self.build() if self.build is not None else reset_copy(self.model)
        first = next(self.model.parameters(), None)
        return model if first is None else model.to(first.device)

    # -- records ---------------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        """What records carry of the case: names, counts and digests, never content."""
        forget = self.split("forget")
        return {
            "name": self.name,
            "task": self.task.name,
            "request": {"count": len(forget), **self.request.describe()},
            "data": {"fingerprint": self.data.fingerprint(), "rows": len(self.data), "columns": self.data.names},
            "splits": {name: len(split) for name, split in self.splits.items()},
            "notes": dict(self.notes),
        }


def reset_copy(model: nn.Module) -> nn.Module:
    """A copy with every parameter drawn anew by its own module's `reset_parameters` (at any depth), buffers included.

    Raises `BadModel` naming parameters that no module can reset: an official code resets only direct children and so
    "retrains" from trained convolutions; here a parameter that stays trained is an error.
    """
    if callable(getattr(model, "fresh_copy", None)):  # a model that knows which of its parts are trained
        return model.fresh_copy()  # type: ignore[operator]
    fresh = copy.deepcopy(model)
    covered: set[int] = set()
    if hasattr(fresh, "_init_weights") and hasattr(fresh, "init_weights") and hasattr(fresh, "config"):
        return type(model)(copy.deepcopy(model.config))  # type: ignore[call-arg]  # a transformers model initialises itself from its config
    for module in fresh.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
            covered |= {id(p) for p in module.parameters(recurse=True)}
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()  # type: ignore[operator]
    left = [name for name, p in fresh.named_parameters() if id(p) not in covered]
    if left:
        raise BadModel(
            f"expected every layer to have reset_parameters, found {len(left)} parameters without ({', '.join(left[:3])}); "
            "pass Case(build=function that makes a fresh model)"
        )
    return fresh


def _about_model(problems: list[str]) -> bool:
    return any("the model" in p and ("logits" in p or "run on" in p or "predictions" in p) for p in problems)
