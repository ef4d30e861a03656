"""Quantisation: round the weights. Unlearning that moved them by less than half a step of the grid is undone.

    a = max |W| / (2^(b-1) - 1)   for each output channel, or each group of its inputs        W_q = a round(W / a)

Round to nearest, symmetric, every weight of at least two dimensions (biases and norms stay); half a step goes to the
even neighbour. A transformers model keeps its embeddings and output head, as the libraries that quantise them do, and its
matrices are rounded in groups of 64 inputs (32 in matrices narrower than 256): with one scale per row a tiny model breaks
at 4 bits whatever it knows. Failing to bring something back proves nothing: most methods move weights further than a step.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expunge.audits.attacks.budget import Attack, Budget, attack_check
from expunge.errors import BadSetting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expunge.cases.case import Case

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SOURCE = "language attacks card, 3; cf. arXiv 2410.16454 (quantisation restores unlearned knowledge)"


def rounded(weight: Tensor, bits: int, channel: int = 0, group: int | None = None) -> Tensor:
    """The weight (two dimensions or more) on a symmetric grid of 2^bits - 1 levels for each index of `channel`.

    group: a grid of its own for each so many inputs of a channel (the last group may be smaller); None for one grid.
    """
    if bits < 2:
        raise BadSetting(f"expected at least 2 bits, found {bits}; a symmetric grid needs -1, 0 and 1")
    if group is not None and group < 1:
        raise BadSetting(f"expected groups of at least 1 input, found {group}; correct it, or pass None")
    rows = weight.movedim(channel, 0)
    flat = rows.flatten(1)
    pieces = flat.split(group, dim=1) if group is not None else (flat,)
    return torch.cat([_grid(piece, bits) for piece in pieces], dim=1).view(rows.shape).movedim(0, channel)


def _grid(rows: Tensor, bits: int) -> Tensor:
    step = rows.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    # A row of zeros has no step and stays as it is.
    return torch.where(step > 0, torch.round(rows / step.clamp(min=torch.finfo(rows.dtype).tiny)) * step, rows)


def matrices(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Every floating-point parameter of at least two dimensions once, with the dimension of its output channels; of a diffusion
    pipeline not the autoencoder's, which knows no concept and whose zeros would be pruned first."""
    coders = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "vae"]
    seen = {id(parameter) for module in coders for parameter in module.parameters()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen and parameter.dim() >= 2 and parameter.is_floating_point():
                seen.add(id(parameter))
                yield parameter, 1 if isinstance(module, TRANSPOSED) else 0


def ends(model: nn.Module) -> set[int]:
    """ids of the parameters of input embeddings and output heads of all transformers models inside."""
    found: set[int] = set()
    for module in model.modules():
        for get in ("get_input_embeddings", "get_output_embeddings"):
            try:
                end = getattr(module, get, lambda: None)()
            except (NotImplementedError, AttributeError):
                end = None  # a transformers model without words has these methods and no answer
            if isinstance(end, nn.Module):
                found |= {id(parameter) for parameter in end.parameters()}
    return found


@dataclass(frozen=True)
class Quantisation(Attack):
    """Weights at `bits` bits. group: inputs that share a scale; None: whole channels, but 64 or 32 in transformers models."""

    bits: int = 4
    group: int | None = None

    @property
    def name(self) -> str:
        return f"quantisation_{self.bits}"

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        model = copy.deepcopy(model)
        kept = ends(model)
        with torch.no_grad():
            for parameter, channel in matrices(model):
                if id(parameter) in kept:
                    continue
                width = parameter.numel() // parameter.shape[channel]
                group = self.group or ((64 if width >= 256 else 32) if kept else None)
                parameter.copy_(rounded(parameter, self.bits, channel, group))
        return model


quantisation_8 = attack_check(Quantisation(8), "What rounding the weights to 8 bits brings back.", source=SOURCE)
quantisation_4 = attack_check(Quantisation(4), "What rounding the weights to 4 bits brings back.", source=SOURCE)
