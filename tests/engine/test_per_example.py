"""Per-example gradients equal the loop over single examples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.engine.per_example import (
    gradient_matrix,
    per_example_gradients,
    per_example_losses,
    squared_gradient_sum,
)
from expunge.errors import BadModel, BadSetting
from expunge.tasks.base import Batch
from expunge.tasks.classification import Classification

TASK = Classification()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).double()


def conv(norm: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 5, 3), norm or nn.GroupNorm(1, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 4)]
    return nn.Sequential(*body).double()


def make_batch(n: int, *shape: int) -> Batch:
    rng = torch.Generator().manual_seed(3)
    columns = {
        "inputs": torch.randn(n, *shape, generator=rng).double(),
        "labels": torch.randint(0, 4, (n,), generator=rng),
        "_classes": 4,
    }
    return Batch(torch.arange(100, 100 + n), columns)


def slow(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    rows = []
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    for i in range(len(batch)):
        logits = model(batch["inputs"][i : i + 1])
        loss = nn.functional.cross_entropy(logits, batch["labels"][i : i + 1])
        rows.append(torch.autograd.grad(loss, list(named.values())))
    return {k: torch.stack([r[j] for r in rows]) for j, k in enumerate(named)}


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
@pytest.mark.parametrize("kind", ["mlp", "conv", "batch_norm_eval"])
def test_equals_the_loop(kind: str, chunk: int | None) -> None:
    model = {"mlp": mlp, "conv": conv, "batch_norm_eval": lambda: conv(nn.BatchNorm2d(5)).eval()}[kind]()
    batch = make_batch(7, *((12,) if kind == "mlp" else (1, 6, 6)))
    expected, found = slow(model, batch), per_example_gradients(model, TASK, batch, chunk=chunk)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-12), name
    looped = per_example_gradients(model, TASK, batch, vectorised=False)
    assert all(torch.allclose(looped[k], v, atol=1e-12) for k, v in expected.items())
    assert all(p.grad is None for p in model.parameters())


def test_mean_of_the_rows_is_the_gradient_of_the_mean() -> None:
    model, batch = mlp(), make_batch(9, 12)
    matrix = gradient_matrix(model, TASK, batch)
    nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"]).backward()
    assert matrix.shape == (9, sum(p.numel() for p in model.parameters()))
    assert torch.allclose(matrix.mean(0), torch.cat([p.grad.flatten() for p in model.parameters()]), atol=1e-12)


def test_empty_batch() -> None:
    model = mlp()
    found = per_example_gradients(model, TASK, make_batch(0, 12))
    assert {k: tuple(v.shape) for k, v in found.items()} == {k: (0, *p.shape) for k, p in model.named_parameters()}
    assert gradient_matrix(model, TASK, make_batch(0, 12)).shape == (0, 12 * 16 + 16 + 16 * 4 + 4)
    assert all(float(v.abs().sum()) == 0 for v in squared_gradient_sum(model, TASK, make_batch(0, 12)).values())
    assert per_example_losses(model, TASK, make_batch(0, 12)).shape == (0,)


def test_frozen_parameters_are_left_out_unless_named() -> None:
    model, batch = mlp(), make_batch(5, 12)
    full = per_example_gradients(model, TASK, batch)
    model[0].requires_grad_(False)
    assert list(per_example_gradients(model, TASK, batch)) == ["2.weight", "2.bias"]
    named = per_example_gradients(model, TASK, batch, names=["0.bias"])
    assert list(named) == ["0.bias"] and torch.allclose(named["0.bias"], full["0.bias"])
    model.requires_grad_(False)
    with pytest.raises(BadModel, match="requires_grad"):
        per_example_gradients(model, TASK, batch)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_squared_sum_equals_the_slow_sum(chunk: int) -> None:
    model, batch = conv(), make_batch(10, 1, 6, 6)
    expected = {k: v.square().sum(0) for k, v in slow(model, batch).items()}
    halves = [
        Batch(batch.ids[c], {k: v[c] for k, v in batch.columns.items() if k != "_classes"})
        for c in (slice(6), slice(6, 10))
    ]
    for batches in (batch, halves):
        found = squared_gradient_sum(model, TASK, batches, chunk=chunk)
        assert all(torch.allclose(found[k], v, atol=1e-12) for k, v in expected.items())


def test_another_loss() -> None:
    model, batch = mlp(), make_batch(4, 12)
    found = per_example_gradients(model, TASK, batch, loss=lambda output, batch: -TASK.loss(output, batch))
    assert torch.allclose(found["2.bias"], -slow(model, batch)["2.bias"])


def test_batch_norm_in_train_mode_is_refused() -> None:
    with pytest.raises(BadModel, match=r"batch statistics.*model\.eval\(\)"):
        per_example_gradients(conv(nn.BatchNorm2d(5)).train(), TASK, make_batch(4, 1, 6, 6))
    with pytest.raises(BadModel, match="batch statistics"):
        per_example_gradients(conv(nn.BatchNorm2d(5, track_running_stats=False)).eval(), TASK, make_batch(4, 1, 6, 6))


def test_dropout_follows_the_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 4)).double()
    batch = make_batch(6, 12)
    assert torch.allclose(per_example_gradients(model.eval(), TASK, batch)["1.weight"], slow(model, batch)["1.weight"])
    dropped = per_example_gradients(model.train(), TASK, batch)["1.weight"]
    masks = (dropped == 0).all(1)  # (B, 12): a dropped input has no gradient in its whole column
    assert masks.any() and not torch.equal(masks[0], masks[1])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else 2 * self.layer(x)


def test_models_that_cannot_be_vectorised_are_told_and_looped() -> None:
    model, batch = Branching(), make_batch(5, 12)
    with pytest.raises(BadModel, match="vectorised=False"):
        per_example_gradients(model, TASK, batch)
    found = per_example_gradients(model, TASK, batch, vectorised=False)
    assert torch.allclose(found["layer.weight"], slow(model, batch)["layer.weight"])


def test_bad_names_and_chunks() -> None:
    with pytest.raises(BadSetting, match="Did you mean '0.weight'"):
        per_example_gradients(mlp(), TASK, make_batch(2, 12), names=["0.wieght"])
    with pytest.raises(BadSetting, match="chunk"):
        per_example_gradients(mlp(), TASK, make_batch(2, 12), chunk=0)
    with pytest.raises(BadSetting, match="empty"):
        per_example_gradients(mlp(), TASK, make_batch(2, 12), names=[])
