"""Models behind a guard: an `nn.Module` with its base's call, saved as a reference to the base and its own small files.

A guard leaves the base's weights as they are, so whoever has the files has the base: suppression, never removal. `Guarded`
is what guards share; `companion` and `differing` serve those that carry a second network made from the base, of which only
the tensors that differ are kept.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from expunge.cases.weights import load_weights
from expunge.errors import BadModel
from expunge.files import digest_weights, is_pipeline, write_atomic
from expunge.parts.blocks import block_stack
from expunge.tasks.denoiser import Denoiser
from expunge.tasks.one_step import OneStep, saved_start

FORMAT = "expunge.guard/1"
FORWARDED = (
    "config", "generation_config", "main_input_name", "device", "dtype", "get_input_embeddings", "name_or_path",
    "num_parameters",
)  # fmt: skip
"""What a guard takes over from its base. Not `generate`, which a guard makes its own, nor the output layer: the base's logits
are not the guard's."""


class Guarded(nn.Module):
    """Base of guards. Subclasses have `saved_as`, `about()` (plain JSON), `tensors()` and `rebuilt(base, about, tensors)`."""

    saved_as: ClassVar[str] = ""
    """Its name in guard.json; not `kind`, which of a diffusion model is what it is conditioned on."""
    known: ClassVar[dict[str, type[Guarded]]] = {}

    def __init_subclass__(cls) -> None:
        if cls.saved_as:
            Guarded.known[cls.saved_as] = cls

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        if name in FORWARDED:
            base = super().__getattr__("base")
            return getattr(base, name, None) if name == "config" else getattr(base, name)
        return super().__getattr__(name)

    # -- files -----------------------------------------------------------------------------------------------------
    def about(self) -> dict[str, Any]:
        """What `rebuilt` needs beside tensors, as plain JSON."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The guard's own tensors."""
        return {}

    @classmethod
    def rebuilt(cls, base: nn.Module, about: dict[str, Any], tensors: dict[str, Tensor]) -> Guarded:
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """guard.json (with the digest of the base's weights) and guard.safetensors."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        own = {k: v.detach().cpu().contiguous().clone() for k, v in self.tensors().items()}
        about = {"format": FORMAT, "kind": self.saved_as, "base": digest_weights(self.base.state_dict()),
                 "base_class": type(self.base).__name__, "about": self.about()}  # fmt: skip
        write_atomic(folder / "guard.safetensors", save(own, metadata={"format": "pt"}))
        write_atomic(folder / "guard.json", json.dumps(about, indent=2, sort_keys=True) + "\n")


def is_guard(folder: Path) -> bool:
    """Whether a guard was saved in this folder."""
    return (folder / "guard.json").exists()


def load_saved(folder: Path, base: nn.Module) -> nn.Module:
    """The model that a run saved in a folder: a guard around `base`, or `base` itself with the saved weights (as a one-step
    generator where it became one)."""
    if is_guard(folder):
        return load_guard(folder, base)
    start = saved_start(folder)
    if start is not None and isinstance(base, Denoiser) and not isinstance(base, OneStep):
        base = OneStep.around(base, start)
    return load_weights(base, folder if is_pipeline(folder) else folder / "model.safetensors")


def is_saved(folder: Path) -> bool:
    """Whether a run has saved its model in this folder."""
    return is_guard(folder) or is_pipeline(folder) or (folder / "model.safetensors").exists()


def load_guard(folder: str | Path, base: nn.Module) -> Guarded:
    """The guard saved in a folder, around its base; `BadModel` for another base, an unknown kind, a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from expunge.parts import combined, concept_adapters, guarded_diffusion  # noqa: F401 (a kind is known once its module is)

    folder = Path(folder)
    try:
        about = json.loads((folder / "guard.json").read_text(encoding="utf-8"))
        own = load_file(str(folder / "guard.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise BadModel(
            f"expected guard.json and guard.safetensors in {folder.name}, found them missing or damaged ({error}); "
            "run the method again"
        ) from error
    if about.get("format") != FORMAT or about.get("kind") not in Guarded.known:
        raise BadModel(
            f"expected a guard of the format {FORMAT}, one of {', '.join(Guarded.known)}, found {about.get('format')}, "
            f"{about.get('kind')}; load it with the version of expunge that wrote it"
        )
    if about["base"] != digest_weights(base.state_dict()):
        raise BadModel(
            f"expected the base that the guard was made for ({about['base_class']}, weights {about['base'][:12]}), found other "
            f"weights ({digest_weights(base.state_dict())[:12]}); load the model that the guard was made from"
        )
    return Guarded.known[about["kind"]].rebuilt(base, about["about"], own)


# -- second networks made from the base --------------------------------------------------------------------------------
def companion(base: nn.Module, blocks: int | None = None, shared: bool = False) -> nn.Module:
    """A copy of a model, of its first `blocks` blocks where given, with all else as it was (embedding, norm, head).

    shared: the copy's tensors are the base's own (no memory), else its own."""
    memo = {id(t): t for t in [*base.parameters(), *base.buffers()]} if shared else {}
    model = copy.deepcopy(base, memo)
    stack = block_stack(model)
    if blocks is None or stack is None or blocks >= len(stack[1]):
        return model
    owner, _, leaf = stack[0].rpartition(".")
    setattr(model.get_submodule(owner) if owner else model, leaf, stack[1][:blocks])
    config = getattr(model, "config", None)
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, blocks)
    for name in ("layer_types", "mlp_layer_types"):  # one entry per block, where an architecture mixes kinds of blocks
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:blocks])
    return model


def differing(model: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """Entries of a model's state that the base does not have, or has otherwise: what must be kept of it."""
    theirs = base.state_dict()
    return {
        k: v for k, v in model.state_dict().items()
        if k not in theirs or theirs[k].shape != v.shape or not torch.equal(theirs[k].to(v), v)
    }  # fmt: skip


def with_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Put tensors in place of parameters and buffers of these names (new ones: what they were shared with stays)."""
    for name, value in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner) if owner else model
        if leaf in module._parameters:
            old = module._parameters[leaf]
            assert old is not None
            module._parameters[leaf] = nn.Parameter(value.to(old.device), requires_grad=False)
        elif leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            raise BadModel(f"expected a tensor of the guard's second network, found '{name}'; run the method again")
    return model


def accepts(model: nn.Module, keyword: str) -> bool:
    """Whether a module may be called with this keyword."""
    parameters = _signature(type(model).forward)
    return keyword in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@lru_cache(maxsize=256)
def _signature(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def cache_keyword(model: nn.Module) -> str:
    """What this version of transformers calls a model's cache, as an argument and in results."""
    return "cache" if "cache" in _signature(type(model).forward) else "past_key_values"
