"""Certified removal: the bound holds at every removal, and the budget is kept (numbers of the method's card)."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load, save
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn

from expunge.errors import BadData, BadSetting, UnmetNeed
from expunge.methods.exact.certified import (
    CertifiedLogistic,
    hessian,
    minimise,
    objective,
    objective_gradient,
    removal_step,
    residual_budget,
    unit_rows,
    worst_case_bound,
)


def breast_cancer() -> tuple[torch.Tensor, torch.Tensor]:
    X, y = (torch.tensor(a) for a in load_breast_cancer(return_X_y=True))
    X = (X - X.mean(0)) / X.std(0, unbiased=False)
    return X / X.norm(dim=1).max(), y


X, Y = breast_cancer()
SIGNS = 2.0 * Y.double() - 1


def remove_one_by_one(model: CertifiedLogistic, count: int):
    keep = torch.ones(len(X), dtype=torch.bool)
    for i in range(count):
        keep[i] = False
        yield keep, model.remove(X[keep], Y[keep], X[i : i + 1], Y[i : i + 1])


def test_gradient_and_hessian_are_those_of_the_objective() -> None:
    rng = torch.Generator().manual_seed(0)
    w, b = torch.randn(30, generator=rng).double(), torch.randn(30, generator=rng).double()
    for loss in ("logistic", "quadratic"):
        value = lambda w, loss=loss: objective(X, SIGNS, w, 0.01, b, loss)  # noqa: E731
        expected = torch.autograd.functional.jacobian(value, w)
        assert torch.allclose(objective_gradient(X, SIGNS, w, 0.01, b, loss), expected, atol=1e-9)
        assert torch.allclose(hessian(X, w, 0.01, loss), torch.autograd.functional.hessian(value, w), atol=1e-9)


@pytest.mark.parametrize("lam", [1e-4, 1e-2, 1.0])
def test_training_ends_with_no_gradient(lam: float) -> None:
    b = torch.randn(30, generator=torch.Generator().manual_seed(1)).double()
    w = minimise(X, SIGNS, lam, b)
    assert float(objective_gradient(X, SIGNS, w, lam, b).norm()) < 1e-9
    nearby = w + 1e-3 * torch.randn(30, generator=torch.Generator().manual_seed(2)).double()
    assert objective(X, SIGNS, nearby, lam, b) > objective(X, SIGNS, w, lam, b)


def test_residual_stays_under_the_bound_at_each_of_50_removals() -> None:
    model = CertifiedLogistic(30, 2, lam=1e-2, when_spent="refuse").train_on(X, Y)
    original, last = model.weight.clone(), float(model.beta[0])
    assert last < 1e-9 and abs(model.budget - 0.228) < 5e-4
    for keep, removal in remove_one_by_one(model, 50):
        residual, bound = float(model.residuals(X[keep], Y[keep])[0]), removal.bounds[0]
        assert residual <= bound and last < bound <= model.budget and not removal.retrained
        last = bound
    assert 1e-5 < residual < 2e-3 and 5e-3 < last < 5e-2  # the card: 3.6e-4 under .023
    assert int(model.rows) == len(X) - 50 and int(model.removals) == 50 and 0 < removal.share < 1
    retrained = minimise(X[keep], SIGNS[keep], 1e-2, model.perturbation[0])
    assert float((model.weight[0] - retrained).norm() / (original[0] - retrained).norm()) < 2e-3
    assert float((model(X).argmax(1) == Y).double().mean()) > 0.9


def test_spent_budget_triggers() -> None:
    refusing = CertifiedLogistic(30, 2, lam=1e-3, when_spent="refuse").train_on(X, Y)
    done = 0
    with pytest.raises(UnmetNeed, match=r"budget 0\.228"):
        for _keep, removal in remove_one_by_one(refusing, 50):
            done, before = done + 1, refusing.weight.clone()
            assert removal.spent <= removal.budget
    assert 30 <= done <= 45  # the card: after 40
    assert torch.equal(refusing.weight, before) and int(refusing.rows) == len(X) - done

    retraining = CertifiedLogistic(30, 2, lam=1e-3).train_on(X, Y)
    first = retraining.perturbation.clone()
    assert torch.equal(first, CertifiedLogistic(30, 2, lam=1e-3).train_on(X, Y).perturbation)
    keep, removal = list(remove_one_by_one(retraining, done + 1))[-1]
    assert removal.retrained and int(retraining.trainings) == 2
    assert not torch.equal(retraining.perturbation, first)
    assert removal.spent < 1e-8
    truth = minimise(X[keep], SIGNS[keep], 1e-3, retraining.perturbation[0])
    assert torch.allclose(retraining.weight[0], truth, atol=1e-8)


def test_quadratic_loss_is_removed_exactly() -> None:
    model = CertifiedLogistic(30, 2, lam=1e-3, loss="quadratic", when_spent="refuse").train_on(X, Y)
    requests = list(remove_one_by_one(model, 20))
    assert all(removal.spent < 1e-9 for _, removal in requests)
    keep = requests[-1][0]
    assert float(model.residuals(X[keep], Y[keep])[0]) < 1e-9
    truth = torch.linalg.solve(
        hessian(X[keep], torch.zeros(30).double(), 1e-3, "quadratic"), X[keep].T @ SIGNS[keep] - model.perturbation[0]
    )
    assert torch.allclose(model.weight[0], truth, atol=1e-9)


def test_a_batch_is_one_request() -> None:
    model = CertifiedLogistic(30, 2).train_on(X, Y)
    removal = model.remove(X[30:], Y[30:], X[:30], Y[:30])
    assert removal.removed == 30 and float(model.residuals(X[30:], Y[30:])[0]) <= removal.bounds[0]
    unchanged = model.weight.clone()
    assert model.remove(X[30:], Y[30:], X[:0], Y[:0]).removed == 0
    assert torch.equal(model.weight, unchanged) and int(model.removals) == 1


def test_data_dependent_bound_is_under_the_worst_case() -> None:
    w = minimise(X, SIGNS, 1e-2, torch.zeros(30).double())
    _, bound = removal_step(X[1:], X[:1], SIGNS[:1], w, 1e-2)
    assert 0 < bound < worst_case_bound(len(X), 1e-2)
    assert worst_case_bound(101, 0.1) == pytest.approx(4 * 0.25 / (0.01 * 100))
    assert residual_budget(2.0, 0.5, 1e-4) == pytest.approx(1 / math.sqrt(2 * math.log(15000)))


def test_one_versus_rest_and_its_accounting() -> None:
    pixels, labels = (torch.tensor(a[:400]) for a in load_digits(return_X_y=True))
    inputs = unit_rows(pixels)
    joint = CertifiedLogistic(64, 10, lam=1e-2, sigma=10.0).train_on(inputs, labels)
    apart = CertifiedLogistic(64, 10, lam=1e-2, sigma=10.0, accounting="per_class").train_on(inputs, labels)
    for model in (joint, apart):
        removal = model.remove(inputs[5:], labels[5:], inputs[:5], labels[:5])
        assert not removal.retrained and len(removal.bounds) == 10
        assert bool((model.residuals(inputs[5:], labels[5:]) <= model.beta).all())
    assert joint.spent == pytest.approx(float(joint.beta.norm())) and apart.spent == float(apart.beta.max())
    assert joint.spent > apart.spent
    for k in (0, 7):  # every head is the binary problem of its class, with its own perturbation
        truth = minimise(inputs, torch.where(labels == k, 1.0, -1.0).double(), 1e-2, apart.perturbation[k])
        fresh = CertifiedLogistic(64, 10, lam=1e-2, sigma=10.0).train_on(inputs, labels)
        assert torch.allclose(fresh.weight[k], truth, atol=1e-8)
    assert joint(inputs.float()).shape == (400, 10) and joint(inputs.float()).dtype == torch.float32


def test_state_and_publication() -> None:
    model = CertifiedLogistic(30, 2).train_on(X, Y)
    model.remove(X[3:], Y[3:], X[:3], Y[:3])
    other = CertifiedLogistic(30, 2)
    other.load_state_dict(load(save(model.state_dict())))
    keep = torch.arange(6, len(X))
    for each in (model, other):
        each.remove(X[keep], Y[keep], X[3:6], Y[3:6])
    assert torch.equal(model.weight, other.weight) and torch.equal(model.beta, other.beta)
    assert set(model.published().state_dict()) == {"weight"}
    assert torch.allclose(model(X).softmax(1)[:, 1], torch.sigmoid(nn.functional.linear(X, model.weight)).squeeze(1))


def test_bad_input() -> None:
    model = CertifiedLogistic(30, 2)
    with pytest.raises(BadData, match="call train_on first"):
        model.remove(X[1:], Y[1:], X[:1], Y[:1])
    with pytest.raises(BadData, match="unit_rows"):
        model.train_on(100 * X, Y)
    with pytest.raises(BadData, match="unit_rows"):
        model.train_on(X * float("nan"), Y)
    with pytest.raises(BadData, match=r"labels in 0\.\.1"):
        model.train_on(X, Y + 1)
    with pytest.raises(BadData, match="rows of the model"):
        model.train_on(X, Y).remove(X[5:], Y[5:], X[:1], Y[:1])
    with pytest.raises(BadSetting, match="accounting"):
        CertifiedLogistic(30, 2, accounting="none")
    with pytest.raises(BadSetting, match="delta"):
        CertifiedLogistic(30, 2, delta=2.0)
    longest = unit_rows(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    assert torch.allclose(longest, torch.tensor([[0.6, 0.8], [0.3, 0.4]]).double())
