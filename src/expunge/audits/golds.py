"""What the unlearned model is compared with: the gold, in five kinds.

    retrain       the case's recipe on the retain split, with a seed
    clean_label   the recipe on retain plus the forget rows under their clean labels: the gold where labels were
    poisoned
                  (Corrective Machine Unlearning, arXiv 2402.14015: retraining on what is left is a baseline there)
    ensemble      the mean prediction of several retrained models: no single model's seed noise
    closed_form   a model given by the caller, e.g. an exact solution
    residual      no model, but a certified bound on what is left

Trained golds are kept in a folder, when one is given, under a digest of everything they depend on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.errors import BadCheckpoint, BadSetting, MissingGold, nearest

if TYPE_CHECKING:
    from expunge.cases.case import Case
    from expunge.cases.data import Split


@dataclass(frozen=True)
class Gold:
    """A reference and how it came to be. bound: of a certified residual (`bound`, `epsilon`, `delta`), when there is no
    model.

    seconds: of training, also of a kept gold when it was made; 0.0 where it was given.
    """

    kind: str
    model: nn.Module | None = None
    seed: int | None = None
    seconds: float = 0.0
    key: str = ""
    cached: bool = False
    bound: Mapping[str, float] = field(default_factory=dict)


class MeanPrediction(nn.Module):
    """The mean of several models' predictions: log of the mean probability for classes, the mean value otherwise.

    Returns (B, K) logits whose softmax is the mean of the softmaxes, or (B, ...) values.
    """

    def __init__(self, models: Sequence[nn.Module], classes: bool):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.classes = classes

    def forward(self, inputs: Tensor) -> Tensor:
        from expunge.tasks.classification import call_model

        outputs = torch.stack([call_model(model, inputs) for model in self.models])
        return (outputs.log_softmax(-1).logsumexp(0) - math.log(len(self.models))) if self.classes else outputs.mean(0)


def retrain(case: Case, seed: int = 0, cache: str | os.PathLike[str] | None = None) -> Gold:
    """The case's recipe on the retain split."""
    return _trained(case, case.split("retain"), "retrain", seed, cache)


def original(case: Case, seed: int = 0, cache: str | os.PathLike[str] | None = None) -> Gold:
    """The case's recipe on all its training rows: the model to unlearn from, for benchmarks that make their own."""
    return _trained(case, case.split("train"), "original", seed, cache)


def clean_label(
    case: Case,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    column: str = "clean_labels",
    rows: str = "forget",
) -> Gold:
    """The recipe on all rows, with the labels of the `rows` ("forget", or "all" for partly identified requests)
    cleaned."""
    if rows not in ("forget", "all"):
        raise BadSetting(f"expected rows to be 'forget' or 'all', found {rows!r}; choose one")
    labels = getattr(case.task, "labels", "labels")
    if column not in case.data.names:
        raise MissingGold(
            f"expected a column '{column}' of clean labels for the gold 'clean_label', found "
            f"{', '.join(case.data.names)}; add the column to the data, name another by column=..., or use the gold "
            "'retrain'"
        )
    if not hasattr(case.data, "replaced"):
        raise MissingGold(
            f"expected data in memory for the gold 'clean_label', found {type(case.data).__name__}; "
            "load it first, e.g. Case(data=data.load(), ...)"
        )
    dirty, clean = case.data.column(labels), case.data.column(column)
    changed = torch.zeros(len(case.data), dtype=torch.bool)
    changed[case.split("forget").ids if rows == "forget" else slice(None)] = True
    fixed = case.data.replaced(**{labels: torch.where(changed, clean.to(dirty.dtype), dirty)})
    train = case.split("train")
    return _trained(case, type(train)("train", fixed, train.ids, train.augment), f"clean_label:{rows}", seed, cache)


def ensemble(
    case: Case,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    size: int = 3,
    models: Sequence[nn.Module] | None = None,
) -> Gold:
    """The mean prediction of the given retrained `models`, or of `size` retrained here with derived seeds."""
    from expunge.seeds import derive

    if models is None:
        if size < 1:
            raise BadSetting(f"expected size >= 1 retrained models, found {size}; give a positive number")
        golds = [retrain(case, derive(seed, "gold", number), cache) for number in range(size)]
        models, seconds = [gold.model for gold in golds], sum(gold.seconds for gold in golds)
    elif not models:
        raise MissingGold(
            "expected retrained models for the gold 'ensemble', found an empty list; pass some, or models=None"
        )
    else:
        seconds = 0.0
    return Gold("ensemble", MeanPrediction(models, case.task.name == "classification").eval(), seed, seconds)


def closed_form(case: Case, seed: int = 0, cache: Any = None, model: nn.Module | None = None) -> Gold:
    """A given model, e.g. the exact solution without the forget rows."""
    if not isinstance(model, nn.Module):
        raise MissingGold(
            f"expected the exact model for the gold 'closed_form', found {type(model).__name__}; pass model=..., or "
            "use 'retrain'"
        )
    return Gold("closed_form", model)


def residual(case: Case, seed: int = 0, cache: Any = None, bound: Mapping[str, float] | None = None) -> Gold:
    """No model, but a certified bound on what is left, e.g. {"bound": 0.01, "epsilon": 1.0, "delta": 1e-5}."""
    if not bound or "bound" not in bound:
        raise MissingGold(
            f"expected a certified bound for the gold 'residual', found {bound!r}; pass "
            f"bound={{'bound': ..., 'epsilon': ..., 'delta': ...}} from the method's record, or use 'retrain'"
        )
    return Gold("residual", None, bound=dict(bound))


GOLDS: dict[str, Callable[..., Gold]] = {
    "retrain": retrain,
    "clean_label": clean_label,
    "ensemble": ensemble,
    "closed_form": closed_form,
    "residual": residual,
}


def make_gold(
    kind: str, case: Case, seed: int = 0, cache: str | os.PathLike[str] | None = None, **settings: Any
) -> Gold:
    """The gold of this kind; `cache` is a folder where trained golds are kept."""
    if kind not in GOLDS:
        raise BadSetting(
            f"expected a gold, one of {', '.join(GOLDS)}, found '{kind}'.{nearest(kind, GOLDS)} Use one of them."
        )
    try:
        return GOLDS[kind](case, seed=seed, cache=cache, **settings)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise BadSetting(f"expected settings of the gold '{kind}', found {sorted(settings)}; {error}") from error


def gold_key(case: Case, split: Split, kind: str, seed: int) -> str:
    """sha256 of all a trained gold depends on: recipe, data, live rows, seed, kind of gold, task, shape and maker of
    the model."""
    live = hashlib.sha256(torch.as_tensor(split.ids, dtype=torch.int64).numpy().tobytes()).hexdigest()
    facts = {
        "kind": kind,
        "recipe": _settings(case.recipe),
        "data": split.data.fingerprint(),
        "live": live,
        "seed": int(seed),
        "task": _settings(case.task),
        "model": [
            type(case.model).__qualname__,
            [[n, list(t.shape), str(t.dtype)] for n, t in case.model.state_dict().items()],
        ],
        "build": _name(case.build),
        "augment": _name(split.augment),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _trained(case: Case, split: Split, kind: str, seed: int, cache: str | os.PathLike[str] | None) -> Gold:
    """The recipe on a split, read from the cache where it is kept."""
    if case.recipe is None:
        raise MissingGold(
            f"expected the recipe that trains the gold '{kind.partition(':')[0]}', found none in the case; pass "
            "Case(recipe=Training(...)), or give a retrained model as the gold 'closed_form'"
        )
    key = gold_key(case, split, kind, seed)
    file = None if cache is None else Path(cache) / f"{key}.safetensors"
    if file is not None and file.exists():
        return Gold(kind, _load(case, file, seed), seed, _seconds(file), key, cached=True)
    from expunge import engine

    start = time.perf_counter()
    model = engine.fit(case, split, seed=seed)
    seconds = time.perf_counter() - start
    if file is not None:
        from safetensors.torch import save

        from expunge.files import write_atomic

        # Cloned because tied weights share memory, which safetensors refuses.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
        write_atomic(file, save(tensors, metadata={"format": "pt", "seconds": f"{seconds:.3f}"}))
    return Gold(kind, model, seed, seconds, key)


def _load(case: Case, file: Path, seed: int) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = case.fresh(seed)
    try:
        model.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise BadCheckpoint(
            f"expected the weights of a cached gold in {file.name}, found a file that does not load "
            f"({str(error).splitlines()[0]}); delete this file and run again, and the gold is trained anew"
        ) from error
    return model.eval()


def _seconds(file: Path) -> float:
    """How long the kept gold took to train when it was made; 0.0 where its file does not say."""
    from safetensors import safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return float((opened.metadata() or {}).get("seconds", 0.0))
    except Exception:  # a damaged file is told by whoever reads its weights
        return 0.0


def _settings(thing: Any) -> Any:
    """What was chosen of a dataclass: its class and the fields that differ from their defaults, so that a field which a later
    version adds leaves kept golds in use."""
    if isinstance(thing, type) or not is_dataclass(thing):
        return repr(thing)
    blank = {f.name: f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING
             else MISSING for f in fields(thing)}  # fmt: skip
    chosen = {name: value for name in blank if (value := getattr(thing, name)) != blank[name]}
    return [type(thing).__qualname__, {name: _settings(value) for name, value in chosen.items()}]


def _name(thing: Any) -> str:
    return "" if thing is None else getattr(thing, "__qualname__", None) or repr(thing)
