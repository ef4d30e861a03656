"""Models and data from what people have: files, folders, hub names, functions. Local first, and never a pickle.

    load_data("digits.npz")                      load_model("resnets.py:small", weights="model.safetensors")
    load_data("people.csv", labels="income")     load_model("folder-of-a-transformers-model")
    load_data("cifar10")                         load_model("org/name")

A name that is no path is looked for as a folder in EXPUNGE_DATA (datasets) or in the local cache (models) before any
hub.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from expunge.cases.data import Data, MapData
from expunge.cases.tables import read_file, renamed
from expunge.cases.weights import PICKLES, load_weights, refuse_pickle, save_model
from expunge.errors import BadData, BadModel, nearest, need_extra
from expunge.files import PIPELINE_NETWORKS, is_pipeline
from expunge.tasks.denoiser import Denoiser
from expunge.tasks.one_step import OneStep, saved_start

SUFFIXES = (".npz", ".csv", ".tsv", ".jsonl", ".parquet")
PICTURES = (".png", ".jpg", ".jpeg")


# -- data --------------------------------------------------------------------------------------------------------------
def data_home() -> Path | None:
    """The folder of local data sets, from the environment variable EXPUNGE_DATA."""
    home = os.environ.get("EXPUNGE_DATA")
    return Path(home) if home else None


def load_data(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    inputs: str | None = None,
    labels: str | None = None,
) -> Data:
    """A table from a file, a folder or a data set's name.

    Args:
        source: .npz, .csv, .tsv, .jsonl, .parquet; a folder of such files, one saved by `datasets`, or one of pictures
            in a folder per class; or a name: a folder of EXPUNGE_DATA, else of the hub.
        split: which part of a folder or a named data set.
        inputs, labels: the source's column names; default: the usual ones (image, img, x, ...; label, target, y, ...).
            A table of numbers without an inputs column gets one, of all number columns but the labels.
    """
    name = os.fspath(source) if not isinstance(source, bytes) else source.decode()
    path = Path(name).expanduser()
    if path.is_file():
        return _file(path, inputs, labels)
    if path.is_dir():
        return _folder(path, split, inputs, labels)
    home = data_home()
    local = home / name.rsplit("/", 1)[-1] if home is not None else None
    if local is not None and local.is_dir():
        return _folder(local, split, inputs, labels)
    if path.suffix in (*SUFFIXES, *PICKLES) or path.is_absolute() or name.startswith("."):
        raise BadData(f"expected a data file at '{name}', found none; check the path")
    return _hub(name, split, inputs, labels)


def _file(path: Path, inputs: str | None, labels: str | None) -> Data:
    if path.suffix.lower() in PICKLES:
        raise BadData(
            f"expected data as {', '.join(SUFFIXES)}, found '{path.name}', a pickle, which Expunge never reads "
            "because that "
            "can run code; save the tensors with numpy.savez"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise BadData(
            f"expected data as {', '.join(SUFFIXES)}, found '{path.name}'; convert it, or pass tensors or a "
            "map-style dataset"
        )
    return read_file(path, inputs, labels)


def _folder(folder: Path, split: str, inputs: str | None, labels: str | None) -> Data:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        datasets = need_extra("datasets", "huggingface")
        loaded = datasets.load_from_disk(str(folder))
        if isinstance(loaded, Mapping):
            if split not in loaded:
                raise BadData(f"expected a split among {', '.join(loaded)}, found '{split}'.{nearest(split, loaded)}")
            loaded = loaded[split]
        return _wrapped(loaded, inputs, labels)
    files = sorted(f for suffix in SUFFIXES for f in folder.rglob(f"*{suffix}"))
    chosen = [f for f in files if f.stem == split or f.stem.startswith((f"{split}-", f"{split}_", f"{split}."))]
    if len(chosen) == 1:
        return _file(chosen[0], inputs, labels)
    if len(chosen) > 1 and all(f.suffix == ".parquet" for f in chosen):
        return read_file(chosen, inputs, labels)
    if files:
        raise BadData(
            f"expected one file named after the split '{split}' in {folder.name}, found {len(chosen)} among "
            f"{[f.name for f in files[:5]]}; name a split or a file"
        )
    inner = folder / split if (folder / split).is_dir() else folder
    if any(f.suffix.lower() in PICTURES for f in inner.glob("*/*")):
        datasets = need_extra("datasets", "huggingface")
        return _wrapped(datasets.load_dataset("imagefolder", data_dir=str(inner), split="train"), inputs, labels)
    raise BadData(
        f"expected {', '.join(SUFFIXES)}, a dataset saved by 'datasets', or pictures in a folder per class, "
        "found none in "
        f"{folder.name}; check the folder"
    )


def _hub(name: str, split: str, inputs: str | None, labels: str | None) -> Data:
    datasets = need_extra("datasets", "huggingface")
    try:
        return _wrapped(datasets.load_dataset(name, split=split), inputs, labels)
    except Exception as error:  # the hub raises a family of its own for each cause
        raise BadData(
            f"expected a file, a folder, a folder '{name.rsplit('/', 1)[-1]}' in EXPUNGE_DATA, or a data set of "
            "the hub, found "
            f"no '{name}' ({type(error).__name__}: {_first_line(error)}); check the name, or download it and set "
            "EXPUNGE_DATA"
        ) from error


def _wrapped(dataset: Any, inputs: str | None, labels: str | None) -> MapData:
    names = renamed(dataset.column_names, inputs, labels)
    return MapData(dataset.rename_columns(names) if names else dataset)


# -- models ------------------------------------------------------------------------------------------------------------
def load_model(
    spec: nn.Module | str | os.PathLike[str] | Mapping[str, Any],
    weights: str | os.PathLike[str] | None = None,
    **arguments: Any,
) -> nn.Module:
    """A model from a live module, a transformers folder or hub id, or a function that builds it.

    Args:
        spec: an `nn.Module` (returned as it is); a folder saved by transformers or a hub id (image classifiers and
            causal language models) or by diffusers (pipelines, as a `Denoiser`), safetensors only;
            "package.module:function" or "file.py:function"; or these as a mapping {function or folder, weights, arguments}.
        weights: a .safetensors file for the built model.
        arguments: of the function.
    """
    if isinstance(spec, Mapping):
        known = ("function", "folder", "weights", "arguments")
        unknown = [k for k in spec if k not in known]
        if unknown or not ("function" in spec) ^ ("folder" in spec):
            raise BadModel(
                f"expected a model as {{function: module:name, weights: file, arguments: {{...}}}} or "
                f"{{folder: path}}, found "
                f"{sorted(spec)}; correct it.{nearest(str(unknown[0]), known) if unknown else ''}"
            )
        extra = dict(spec.get("arguments") or {})
        return load_model(
            spec.get("function") or spec["folder"], spec.get("weights", weights), **{**extra, **arguments}
        )
    if isinstance(spec, nn.Module):
        model = spec
    else:
        name = os.fspath(spec)
        if ":" in name and not Path(name).exists():
            model = _built(name, arguments)
        else:
            model = _pretrained(name)
    return model if weights is None else load_weights(model, weights)


def find_function(name: str) -> Callable[..., Any]:
    """`package.module:function` or `file.py:function`; the working folder is looked in as well."""
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            try:
                module = importlib.import_module(place)
            finally:
                sys.path.remove(os.getcwd())
    except (ImportError, OSError) as error:
        raise BadModel(
            f"expected an importable module in '{name}', found none ({error}); give package.module:function or "
            "file.py:function"
        ) from error
    if not callable(getattr(module, function, None)):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise BadModel(f"expected a function '{function}' in {place}, found none.{nearest(function, known)}")
    return getattr(module, function)


def _built(name: str, arguments: dict[str, Any]) -> nn.Module:
    model = find_function(name)(**arguments)
    if not isinstance(model, nn.Module):
        raise BadModel(
            f"expected '{name}' to return a torch.nn.Module, found {type(model).__name__}; return the model itself"
        )
    return model


def load_pipeline(folder: str | os.PathLike[str], null: int | str | None = "last", **arguments: Any) -> Denoiser:
    """A diffusers pipeline's folder, or a hub id, as a `Denoiser` (a `OneStep` where one was saved); safetensors only.

    null: the class id that means "no class" (see `Denoiser`). arguments: of DiffusionPipeline.from_pretrained (torch_dtype, ...)."""
    diffusers = need_extra("diffusers", "generation")
    name, path = os.fspath(folder), Path(folder).expanduser()
    if path.is_dir():
        for network in PIPELINE_NETWORKS:
            pickles = [f.name for f in (path / network).glob("*") if f.suffix in PICKLES]
            if pickles and not any((path / network).glob("*.safetensors")):
                raise BadModel(
                    f"expected the pipeline's weights as safetensors, found {network}/{pickles[0]}, a pickle, which is never "
                    "read because that can run code; save it again with pipeline.save_pretrained(folder, "
                    "safe_serialization=True) where you trust it"
                )
    for only_local in [True] if path.is_dir() else [True, False]:
        try:
            found = diffusers.DiffusionPipeline.from_pretrained(
                name, local_files_only=only_local, use_safetensors=True, **arguments
            )
            start = saved_start(path)
            return (Denoiser(found, null) if start is None else OneStep(found, null, start)).eval()
        except BadModel:
            raise
        except Exception as error:  # diffusers raises OSError, ValueError and its libraries' own for one cause
            problem = error
    raise BadModel(
        f"expected a diffusers pipeline in a folder, the local cache or the hub, found no usable '{name}' "
        f"({type(problem).__name__}: {_first_line(problem)}); download it on a connected machine with "
        "pipeline.save_pretrained(folder) and give the folder"
    ) from problem


def _pretrained(name: str) -> nn.Module:
    path = Path(name).expanduser()
    if path.is_dir() and is_pipeline(path):
        return load_pipeline(path)
    if path.is_file():
        refuse_pickle(path)
        raise BadModel(
            f"expected a model, found the weights file '{path.name}' alone; say what builds it: "
            f"load_model('module:function', weights='{path.name}')"
        )
    if path.is_dir():
        if not (path / "config.json").exists() or not any(path.glob("*.safetensors")):
            pickles = [f.name for f in path.iterdir() if f.suffix in PICKLES]
            raise BadModel(
                f"expected a transformers folder with config.json and *.safetensors, found {path.name} with neither "
                "or one"
                + (f" (and {pickles[0]}, a pickle, which is never read)" if pickles else "")
                + "; save it with model.save_pretrained(folder, safe_serialization=True)"
            )
    elif path.suffix in (*PICKLES, ".safetensors") or path.is_absolute() or name.startswith("."):
        raise BadModel(f"expected a model at '{name}', found none; check the path")
    transformers = need_extra("transformers", "huggingface")
    for only_local in [True] if path.is_dir() else [True, False]:
        try:
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=only_local)
            kind = _auto_class(transformers, config)
            return kind.from_pretrained(name, local_files_only=only_local, use_safetensors=True).eval()
        except Exception as error:  # transformers raises OSError, ValueError and safetensors' own for one cause
            problem = error
    gated = "gated" in str(problem).lower() or "401" in str(problem)
    raise BadModel(
        "expected an image classifier or a causal language model of transformers as safetensors in a folder, the local "
        f"cache or the hub, found no usable '{name}' ({type(problem).__name__}: {_first_line(problem)}); "
        + ("accept its licence on the hub and log in, or " if gated else "check the name, or ")
        + "download it on a connected machine with model.save_pretrained(folder) and give the folder"
    ) from problem


def _auto_class(transformers: Any, config: Any) -> Any:
    """The family that the saved model says it is of."""
    made = " ".join(config.architectures or ())
    if "CausalLM" in made or "LMHead" in made:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageClassification


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer in a folder or of a hub id, local first."""
    transformers = need_extra("transformers", "huggingface")
    for only_local in [True] if Path(name).is_dir() else [True, False]:
        try:
            return transformers.AutoTokenizer.from_pretrained(os.fspath(name), local_files_only=only_local)
        except Exception as error:
            problem = error
    raise BadModel(
        f"expected a tokenizer in '{name}', found none ({type(problem).__name__}: {_first_line(problem)}); save it beside the "
        "model with tokenizer.save_pretrained(folder)"
    ) from problem


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no details"


__all__ = [
    "data_home",
    "find_function",
    "load_data",
    "load_model",
    "load_pipeline",
    "load_tokenizer",
    "load_weights",
    "save_model",
]
