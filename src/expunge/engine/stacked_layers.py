"""Convolution and max pooling of stacked models on CPU: what `torch.func.vmap` does with them, in a faster layout.

vmap makes one grouped convolution of M models' convolutions, channels first, and max pooling copies its input. On CPU that takes
longer than need be. Here activations stay (B, M, C, H, W) with memory in the order B, H, W, M, C: channels last over all models'
channels, which pooling is some six times faster with, and from one layer to the next nothing is copied. Where one model's
convolution is large enough to keep the processor busy, M of them one after another are faster than one in M groups.

    with StackedLayers():                  # inside the function that vmap maps
        output = functional_call(module, state, (batch,))

The same arithmetic in another order: results are equal up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LARGE = 4_000_000
"""Multiply-adds of one model's convolution from which one after another is faster (measured on AVX2: 3x3, 1 to 48 channels, 64
images; grouped 3 times faster at 0.3 and 1 million, 1.2 to 2.8 times slower at 9 million and more)."""


class StackedLayers(TorchFunctionMode):
    """Sends 2D convolutions and max poolings on CPU to the rules below; everything else is left alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        layer = LAYERS.get(func)
        if layer is not None and args and args[0].dim() == 4 and args[0].device.type == "cpu":
            return layer(*args, **kwargs)
        return func(*args, **kwargs)


class _Convolution(torch.autograd.Function):
    """Differentiated through its rule: no parameter reaches it unstacked, so a backward of its own is never asked for."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: Any) -> tuple[Tensor, int]:
        models, (stride, padding, dilation, groups) = info.batch_size, how
        x = _stacked(x, dims[0], 1, models)
        weight = _stacked(weight, dims[1], 0, models)
        bias = None if bias is None else _stacked(bias, dims[2], 0, models)
        if x[:, 0].numel() * weight[0, :, 0].numel() > LARGE * _area(stride):
            parts = [None] * models if bias is None else bias.unbind()
            each = [
                F.conv2d(_last(one), w, b, *how) for one, w, b in zip(x.unbind(1), weight.unbind(), parts, strict=True)
            ]
            return torch.stack([_last(one).permute(0, 2, 3, 1) for one in each], 3).permute(0, 3, 4, 1, 2), 1
        bias = None if bias is None else bias.flatten()
        found = F.conv2d(_last(x.flatten(1, 2)), weight.flatten(0, 1), bias, stride, padding, dilation, models * groups)
        return found.unflatten(1, (models, -1)), 1


class _MaxPool(torch.autograd.Function):
    """As `_Convolution`."""

    @staticmethod
    def forward(x: Tensor, how: tuple[Any, ...]) -> Tensor:
        return F.max_pool2d(x, *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, how: Any) -> tuple[Tensor, int]:
        merged = _stacked(x, dims[0], 1, info.batch_size).flatten(1, 2)
        return F.max_pool2d(_last(merged), *how).unflatten(1, (info.batch_size, -1)), 1


def _convolution(x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
                 groups: int = 1) -> Tensor:  # fmt: skip
    return _Convolution.apply(x, weight, bias, (stride, padding, dilation, groups))


def _max_pool(x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
              ceil_mode: bool = False, return_indices: bool = False) -> Any:  # fmt: skip
    if return_indices:
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, True)
    return _MaxPool.apply(x, (kernel_size, stride, padding, dilation, ceil_mode))


LAYERS = {torch.conv2d: _convolution, F.max_pool2d: _max_pool, torch.max_pool2d: _max_pool}


def _stacked(value: Tensor, dim: int | None, to: int, models: int) -> Tensor:
    """The models' dimension at `to`; what all share is repeated without a copy."""
    if dim is not None:
        return value.movedim(dim, to)
    return value.unsqueeze(to).expand(*value.shape[:to], models, *value.shape[to:])


def _last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _area(stride: Any) -> int:
    return stride * stride if isinstance(stride, int) else stride[0] * stride[-1]
