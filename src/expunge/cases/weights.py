"""Weights in and out of a module, as safetensors only: a file that could run code when read is refused."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from expunge.errors import BadModel
from expunge.files import PIPELINE_NETWORKS, is_pipeline, write_atomic

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def save_model(model: nn.Module, folder: Path, mode: int | None = None) -> None:
    """A Hugging Face model in its own format; any other module as model.safetensors, written whole or not at all.

    mode: permission bits of model.safetensors, where they should not be a new file's."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    from safetensors.torch import save

    # clone: tied weights share memory, which the format refuses
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    write_atomic(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}), mode)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Put safetensors weights (a file, or a pipeline's folder) into a module of the same keys and shapes, in place; returns it.

    Raises `BadModel` for a pickle (by name or by content), a damaged file, and weights of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    refuse_pickle(path)
    pipeline = path.is_dir() and is_pipeline(path)
    if path.suffix != ".safetensors" and not pipeline:
        raise BadModel(
            f"expected weights as .safetensors, found '{path.name}'; save them with "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        )
    try:
        state = pipeline_state(path) if pipeline else load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise BadModel(
            f"expected a whole safetensors file, found {path.name} damaged or missing ({error}); export or copy "
            "it again"
        ) from error
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes differ
        raise BadModel(
            f"expected weights of the shapes of {type(model).__name__}, found others "
            f"({str(error).splitlines()[-1].strip()}); "
            "build the very model these weights come from (number of classes, widths)"
        ) from error
    missing = _not_tied(model, result.missing_keys, state)
    if missing or result.unexpected_keys:
        raise BadModel(
            f"expected the weights of {type(model).__name__}, found {len(missing)} missing ({missing[:3]}) and "
            f"{len(result.unexpected_keys)} unknown ({result.unexpected_keys[:3]}); give the module:function that "
            "builds the "
            "very model these weights come from"
        )
    return model


def pipeline_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a pipeline's networks by their names in a `Denoiser`."""
    from safetensors.torch import load_file

    return {
        f"{part}.{name}": value
        for part in PIPELINE_NETWORKS
        for file in sorted((folder / part).glob("*.safetensors"))
        for name, value in load_file(str(file)).items()
    }


def refuse_pickle(path: Path) -> None:
    """Raise `BadModel` if the name or the first bytes say that reading the file means unpickling it."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError:
        head = b""  # missing or a folder: whoever reads it next says so
    # A safetensors file has 8 bytes of length and then "{", so a length that begins like a pickle is not taken for one.
    content = head[8:9] != b"{" and (head.startswith((b"PK\x03\x04", b"\x1f\x8b")) or head[:1] == b"\x80")
    if path.suffix.lower() in PICKLES or content:
        found = (
            "which is named like a pickle" if path.suffix.lower() in PICKLES else "whose content is a pickle or a zip"
        )
        raise BadModel(
            f"expected weights as .safetensors, found '{path.name}', {found}; Expunge never unpickles files, "
            "because that can "
            "run code. Load it in your own code, if you trust it, and save it with "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        )


def _not_tied(model: nn.Module, missing: list[str], state: dict[str, Tensor]) -> list[str]:
    """Missing keys that are not another name of a tensor that was given."""
    own = model.state_dict()
    given = {own[key].data_ptr() for key in state if key in own and own[key].numel()}
    return [key for key in missing if own[key].data_ptr() not in given]
