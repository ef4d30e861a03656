"""Quantisation: round the weights. Unlearning that moved them by less than half a step of the grid is undone.

    a = max |W| / (2^(b-1) - 1)   for each output channel        W_q = a round(W / a)

Round to nearest, symmetric, every weight of at least two dimensions (biases and norms stay); half a step goes to the
even neighbour. Failing to bring something back proves nothing: most methods move weights further than a step.
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


def rounded(weight: Tensor, bits: int, channel: int = 0) -> Tensor:
    """The weight (two dimensions or more) on a symmetric grid of 2^bits - 1 levels for each index of `channel`."""
    if bits < 2:
        raise BadSetting(f"expected at least 2 bits, found {bits}; a symmetric grid needs -1, 0 and 1")
    others = [d for d in range(weight.dim()) if d != channel]
    step = weight.abs().amax(dim=others, keepdim=True) / (2 ** (bits - 1) - 1)
    # A channel of zeros has no step and stays as it is.
    return torch.where(step > 0, torch.round(weight / step.clamp(min=torch.finfo(weight.dtype).tiny)) * step, weight)


def matrices(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Every floating-point parameter of at least two dimensions once, with the dimension of its output channels."""
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen and parameter.dim() >= 2 and parameter.is_floating_point():
                seen.add(id(parameter))
                yield parameter, 1 if isinstance(module, TRANSPOSED) else 0


@dataclass(frozen=True)
class Quantisation(Attack):
    """Weights at `bits` bits."""

    bits: int = 4

    @property
    def name(self) -> str:
        return f"quantisation_{self.bits}"

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        model = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, channel in matrices(model):
                parameter.copy_(rounded(parameter, self.bits, channel))
        return model


quantisation_8 = attack_check(Quantisation(8), "What rounding the weights to 8 bits brings back.", source=SOURCE)
quantisation_4 = attack_check(Quantisation(4), "What rounding the weights to 4 bits brings back.", source=SOURCE)
