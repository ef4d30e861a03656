"""From the checked file to live objects: `build_case(CaseFile)` gives the library's `Case`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from expunge.cases import Case, requests
from expunge.cases.data import Data, MapData, TensorData
from expunge.cases.loading import find_function, load_data, load_model, load_tokenizer
from expunge.cases.text import load_text
from expunge.cli.config import CaseFile, Recipe, Request, Table
from expunge.errors import BadData, BadRequest, nearest
from expunge.methods.stored import load_protected
from expunge.parts.plan import Optimizer, Training
from expunge.tasks import task as make_task


def build_case(file: CaseFile) -> Case:
    """Load model and data, resolve the request; every check of `Case` runs here, before any compute."""
    _importable(file.base)
    return Case(
        model=_model(file),
        data=_data(file, file.data),
        test=None if file.test is None else _data(file, file.test),
        holdout=None if file.holdout is None else _data(file, file.holdout),
        request=_request(file, file.request),
        task=make_task({"name": file.task.name, **file.task.settings}),
        recipe=None if file.recipe is None else training(file.recipe),
        build=_fresh(file),
        name=file.name,
        seed=file.seeds.case,
    )


def training(recipe: Recipe) -> Training:
    """The recipe as the library's `Training`."""
    return Training(
        recipe.epochs, recipe.batch_size, Optimizer(**recipe.optimizer.model_dump()), schedule=recipe.schedule
    )


def _importable(base: str) -> None:
    """The YAML file's folder is looked in first; a module of that name from another case's folder is let go."""
    folder = str(Path(base).resolve())
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    for name, module in list(sys.modules.items()):
        own = Path(folder, f"{name}.py")
        if "." not in name and own.exists() and getattr(module, "__file__", None) != str(own):
            del sys.modules[name]
    importlib.invalidate_caches()


def _model(file: CaseFile) -> nn.Module:
    """A folder beside the case file, a hub id, or a function with its weights; or what `protect` has made of it."""
    spec = file.model
    if spec.factory:
        model = load_model(
            {"function": spec.factory, "weights": str(file.path(str(spec.weights))), "arguments": spec.settings}
        )
    else:
        model = load_model(str(file.path(spec.path)) if spec.path else str(spec.hub))
    return model if spec.protected is None else load_protected(model, file.path(spec.protected))


def _fresh(file: CaseFile) -> Callable[[], Any] | None:
    """A factory builds an untrained model as it is; other kinds are reset layer by layer."""
    if not file.model.factory:
        return None
    function, settings = find_function(file.model.factory), dict(file.model.settings)
    return lambda: function(**settings)


def _data(file: CaseFile, spec: Table) -> Data:
    if file.task.name == "language":
        return _texts(file, spec)
    data = load_data(str(file.path(spec.path)) if spec.path else str(spec.hub), split=spec.split)
    if spec.columns:
        data = _renamed(data, spec.columns)
    if spec.transform:
        data = find_function(spec.transform)(data)
        if not isinstance(data, Data):
            raise BadData(
                f"expected {spec.transform} to return a Data, found {type(data).__name__}; wrap it with as_data"
            )
    return data


def _texts(file: CaseFile, spec: Table) -> Data:
    """Questions and answers, or plain text, in the tokens of the model's own tokenizer."""
    about = spec.text
    source = file.model.tokenizer or file.model.path or file.model.hub
    if source is None:
        raise BadData("expected a tokenizer for the texts, found none; add model.tokenizer: folder or hub id")
    if spec.path is None:
        raise BadData(
            f"expected data.path, a file or folder of texts, found data.hub {spec.hub}; download it and give the file"
        )
    local = file.path(source)
    tokenizer = load_tokenizer(local if local.is_dir() else source)
    lines = file.path(about.refusals).read_text("utf-8").splitlines() if about.refusals else []
    return load_text(
        file.path(spec.path), tokenizer, question=about.question, answer=about.answer, text=about.text,
        template=about.template, window=about.window, max_length=about.max_length,
        refusals=[line.strip() for line in lines if line.strip()],
    )  # fmt: skip


def _renamed(data: Data, columns: dict[str, str]) -> Data:
    """columns: task's name -> file's name. Columns that are not named keep their names."""
    for theirs in columns.values():
        if theirs not in data.names:
            raise BadData(f"expected a column '{theirs}', found {', '.join(data.names)}.{nearest(theirs, data.names)}")
    ours = {theirs: name for name, theirs in columns.items()}
    if isinstance(data, TensorData):
        return TensorData(shared=data.shared, **{ours.get(k, k): v for k, v in data.columns.items()})
    if isinstance(data, MapData):
        read = data.columns
        return MapData(data.dataset, lambda example: {ours.get(k, k): v for k, v in read(example).items()})
    raise BadData(f"expected rows that can be renamed, found {type(data).__name__}; rename in a transform instead")


def _request(file: CaseFile, spec: Request | None) -> requests.Request:
    if spec is None:
        return requests.none()
    if spec.label is not None:
        return requests.label(spec.label)
    if spec.where is not None:
        return requests.where(*spec.where)
    if isinstance(spec.samples, str):
        path = file.path(spec.samples)
        try:
            return requests.samples(int(word) for word in path.read_text("utf-8").replace(",", " ").split())
        except (OSError, ValueError) as error:
            raise BadRequest(
                f"expected row numbers in the text file {path.name}, one per line, found {error}; correct the file"
            ) from error
    return requests.samples(spec.samples or [])
