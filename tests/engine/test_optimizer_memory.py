"""How a step of the optimizer takes the weights: as one list, by one kernel, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.engine import optimizer as module
from expunge.engine.optimizer import MaskedOptimizer
from expunge.parts.plan import Optimizer


def stepped(name: str, monkeypatch, most: int) -> tuple[dict, list[torch.Tensor]]:
    """Twenty steps on drawn gradients: how the weights were taken, and where they ended."""
    monkeypatch.setattr(module, "LISTED", most)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 7), nn.Linear(7, 5))
    spec = Optimizer(name, lr=1e-2, weight_decay=0.01, momentum=0.9 if name == "sgd" else 0.0)
    own = MaskedOptimizer(model, spec, {n: True for n, _ in model.named_parameters()}, 20, 20)
    for _ in range(20):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        own.step()
    group = own.inner.param_groups[0]
    return {k: group.get(k) for k in ("foreach", "fused")}, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_large_models_are_stepped_without_a_copy_and_end_where_small_ones_do(name, monkeypatch):
    """A list copies all second moments: one more set of weights at the peak."""
    listed, small = stepped(name, monkeypatch, 2**20)
    apart, large = stepped(name, monkeypatch, 100)
    assert listed["foreach"] and not listed["fused"] and not apart["foreach"]
    assert bool(apart["fused"]) == (name != "sgd" and module._fused_on_cpu(torch.optim.Adam))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_without_the_kernel_weights_go_one_by_one_to_the_same_bits(name, monkeypatch):
    monkeypatch.setattr(module, "_fused_on_cpu", lambda _: False)
    (_, small), (apart, large) = (stepped(name, monkeypatch, most) for most in (2**20, 100))
    assert not any(apart.values())
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))
