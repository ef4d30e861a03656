"""Randomness is handed in. Every random draw in Expunge comes from a seed derived here.

`derive(seed, "engine", step)` is a pure function of its arguments, so a run that is killed and resumed draws the same
numbers as one that was not: there is no generator state to save.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, *path: object) -> int:
    """A 63-bit seed for the stream named by `path`; equal arguments give equal seeds on every machine."""
    text = "/".join([str(int(seed)), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *path: object, device: str = "cpu") -> torch.Generator:
    """A torch generator on `device` for the stream named by `path`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, *path))


def numpy_generator(seed: int, *path: object) -> np.random.Generator:
    """A numpy generator for the stream named by `path`."""
    import numpy as np

    return np.random.default_rng(derive(seed, *path))
