"""Models of `expunge.protect` on disk: tensors as safetensors, and a small JSON of what shape they take. Never a pickle.

    model.safetensors    all weights and statistics (shards and snapshots, sums, budgets, the log of updates)
    protected.json       {"format", "method", "structure": counts and settings, "weights": sha256 of the tensors}

A protected model says how it is built by `expunge_structure() -> dict` (plain data), and its class has
`rebuilt(base, **structure)`, which makes it again with empty tensors around the architecture of the case's model. What is
read back serves requests to the same tensors as the object that was saved.

Both files are readable by their owner alone: they hold what must stay private (certified removal's perturbation, sums and
logs derived from rows). A folder from before a request still knows the rows of that request: delete it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from expunge.cases.weights import load_weights, save_model
from expunge.errors import BadModel
from expunge.files import digest_weights, write_atomic
from expunge.methods.registry import find

FORMAT = "expunge.protected/1"
FILE = "protected.json"
PRIVATE = 0o600


def is_protected(model: nn.Module) -> bool:
    """Was it trained by `expunge.protect`?"""
    return bool(getattr(model, "expunge_protection", ""))


def save_protected(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the model into the folder; returns the folder."""
    folder = Path(folder)
    if not is_protected(model):
        raise BadModel(
            f"expected a model trained by expunge.protect(case, method), found a {type(model).__name__}; save an ordinary "
            "one with safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        )
    save_model(model, folder, mode=PRIVATE)
    about = {
        "format": FORMAT, "method": model.expunge_protection, "structure": model.expunge_structure(),  # type: ignore[operator]
        "weights": digest_weights(model.state_dict()),
    }  # fmt: skip
    # Last: a folder whose writing was cut off has no structure, or one whose digest does not fit.
    write_atomic(folder / FILE, json.dumps(about, indent=2, sort_keys=True) + "\n", mode=PRIVATE)
    return folder


def load_protected(base: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """The model that `save_protected` wrote. base: a model of the architecture that `protect` was given (any weights)."""
    folder = Path(folder)
    about = read_structure(folder)
    found = find(str(about["method"]))
    if found.rebuild is None:
        raise BadModel(
            f"expected a method that acts at training time in {folder.name}/{FILE}, found '{found.name}'; train the model "
            "anew with expunge.protect"
        )
    try:
        model = found.rebuild(base, **about["structure"])
    except (TypeError, KeyError, ValueError) as error:
        raise BadModel(
            f"expected the structure of a {found.name} model in {folder.name}/{FILE}, found another ({error}); use the "
            "file as it was written"
        ) from error
    load_weights(model, folder / "model.safetensors")
    if digest_weights(model.state_dict()) != about["weights"]:
        raise BadModel(
            f"expected the tensors that {folder.name}/{FILE} was written with, found others; use both files of one folder, "
            "or save the model again"
        )
    device = next(base.parameters(), None)
    return model if device is None else model.to(device.device)


def read_structure(folder: Path) -> dict[str, Any]:
    """protected.json, checked."""
    file = folder / FILE
    try:
        about = json.loads(file.read_text("utf-8"))
        known = about["format"] == FORMAT and isinstance(about["structure"], dict) and "method" in about
        known = known and isinstance(about["weights"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadModel(
            f"expected a folder written by 'expunge protect' with a {FILE}, found none that can be read in {folder} "
            f"({type(error).__name__}); give the folder that holds it"
        ) from error
    if not known:
        raise BadModel(f"expected {FORMAT} in {folder.name}/{FILE}, found another format; save the model again")
    return about


__all__ = ["is_protected", "load_protected", "read_structure", "save_protected"]
