"""The original on disk: what a run that changes the user's model itself goes back to, and compares with.

Changing a model in place saves its second copy in memory. The weights are written once, and mapped back: their pages are read
when somebody looks at them (a rollback, a reference, a measurement of the original) and cost nothing until then.
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn


class Original:
    """A module as it was when this was made. folder: of the file, which has no name and goes when nobody maps it any more."""

    def __init__(self, model: nn.Module, folder: Path | None = None):
        handle, path = tempfile.mkstemp(prefix=".original.", suffix=".part", dir=folder)
        os.close(handle)
        try:
            # not safetensors, whose writer holds a second copy of all tensors while it works
            torch.save(model.state_dict(), path)
            self.state: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        finally:
            os.unlink(path)
        mapped = {id(p): nn.Parameter(self.state[name], requires_grad=False) for name, p in model.named_parameters()}
        self.module = copy.deepcopy(model, mapped).eval()
        """The model of then, frozen, on the CPU."""
