"""Convolution and pooling of stacked models equal those of each model, outputs and gradients, by both ways of computing them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from expunge.engine import stacked_layers
from expunge.engine.ensemble import stacked
from expunge.engine.stacked_layers import StackedLayers

MODELS = 3


class Net(nn.Module):
    """Strides, groups, dilation, paddings by number, by word and circular, convolutions without bias, overlapping pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=(2, 1), padding=1)
        self.second = nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same", bias=False)
        self.third = nn.Conv2d(6, 3, (1, 3), padding=(0, 1), padding_mode="circular")
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.last = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.second(self.first(x).relu()))
        x, _ = nn.functional.max_pool2d(self.third(x), 2, return_indices=True)
        return self.last(x.flatten(1))


@pytest.mark.parametrize("large", [0, 10**9])
@pytest.mark.parametrize("shared", [False, True])
def test_stacked_layers_equal_each_models_own(large: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked_layers, "LARGE", large)
    torch.manual_seed(0)
    models = [Net().double() for _ in range(MODELS)]
    x = torch.randn(MODELS, 5, 2, 8, 8).double()
    for model in models:
        model(x[0])  # gives the lazy layer its shape
    state, _ = stacked(models)
    moving = [value.requires_grad_() for value in state.values()]
    template = copy.deepcopy(models[0])

    def one(values: dict[str, Tensor], images: Tensor) -> Tensor:
        with StackedLayers():
            return functional_call(template, values, (images,))

    found = vmap(one, in_dims=(0, None if shared else 0))(state, x[0] if shared else x)
    gradients = torch.autograd.grad(found.square().sum(), moving)
    for i, model in enumerate(models):
        mine = model(x[0] if shared else x[i])
        assert torch.allclose(found[i], mine, rtol=1e-12, atol=1e-12)
        own = torch.autograd.grad(mine.square().sum(), list(model.parameters()))
        for stacked_gradient, gradient in zip(gradients, own, strict=True):
            assert torch.allclose(stacked_gradient[i], gradient, rtol=1e-10, atol=1e-10)


def test_no_layer_copies_its_input_between_convolution_and_pooling() -> None:
    """What makes it fast: activations keep the order B, H, W, M, C from layer to layer."""

    def one(weight: Tensor, images: Tensor) -> Tensor:
        with StackedLayers():
            return nn.functional.max_pool2d(nn.functional.conv2d(images, weight, None, 1, 1).relu(), 2)

    weight, x = torch.randn(MODELS, 4, 2, 3, 3), torch.randn(MODELS, 5, 2, 8, 8)
    found = vmap(one, out_dims=1)(weight, x)
    assert found.shape == (5, MODELS, 4, 4, 4) and found.permute(0, 3, 4, 1, 2).is_contiguous()
