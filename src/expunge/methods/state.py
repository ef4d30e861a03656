"""What a method keeps between requests (`outcome.state`), as one safetensors file of a run folder.

    unlearn(case, "ssd", run="runs/first")                                       # leaves runs/first/state.safetensors
    unlearn(next_case, "ssd", stored="always", state="runs/first")               # no pass over all data

A value of the state is a mapping of names to tensors, or plain JSON; a key has no "/". The file is the owner's alone to read:
what is kept was measured with the forgotten rows among the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from expunge.errors import BadData, BadSetting, UnmetNeed
from expunge.files import digest_bytes, digest_weights, write_atomic
from expunge.methods.stored import PRIVATE

FILE = "state.safetensors"


def save_state(state: Mapping[str, Any], folder: Path) -> None:
    """Write the state into the folder, whole or not at all. Raises `BadSetting` for a value that is neither tensors nor JSON."""
    from safetensors.torch import save

    tensors, plain = _parts(state)
    write_atomic(folder / FILE, save(tensors, metadata={"plain": json.dumps(plain, sort_keys=True)}), PRIVATE)


def load_state(place: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that a run left: its folder, or the file. Tensors are on the CPU.

    Raises `UnmetNeed` where there is none, `BadData` for a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(place)
    file = file / FILE if file.is_dir() else file
    if not file.exists():
        raise UnmetNeed(
            f"expected the folder of a run whose method keeps something for the next request (ssd, lfssd), found no {FILE} at "
            f"{place}; run that request first, call expunge prepare, or drop state"
        )
    try:
        with safe_open(str(file), framework="pt") as opened:
            state = json.loads((opened.metadata() or {})["plain"])
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                key, _, inner = name.partition("/")
                state.setdefault(key, {})[inner] = opened.get_tensor(name)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BadData(
            f"expected {file.name} whole, as a run has written it, found it damaged ({error}); run that request again, or "
            "drop state"
        ) from error
    return state


def digest_state(state: Mapping[str, Any]) -> str:
    """sha256 of a state: equal states, equal digest."""
    tensors, plain = _parts(state)
    return digest_bytes(digest_weights(tensors) + json.dumps(plain, sort_keys=True))


def _parts(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values()):
            tensors |= {f"{key}/{name}": t.detach().cpu().contiguous().clone() for name, t in value.items()}
            continue
        try:
            json.dumps(value)
        except TypeError as error:
            raise BadSetting(
                f"expected what a method keeps as names with tensors, or as plain JSON, found {type(value).__name__} under '{key}'; "
                "keep it in one of these forms"
            ) from error
        plain[key] = value
    return tensors, plain
