"""NTK forgetting against its closed form on linear models, the primal system, and the slow Jacobian."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge import Case, Regression, TensorData, requests, unlearn
from expunge.engine import Workbench
from expunge.methods.edited.ntk import angle_scale, fresh_start, ridge_move, tangent

DECAY, ROWS = 0.05, 40


def line() -> nn.Module:
    return nn.Linear(5, 1).double()


def closed_form(start: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(6,) weights after ridge training from `start`: argmin |f(x) - y|^2 + n lambda |theta - theta_0|^2."""
    X = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    origin = torch.cat([p.detach().flatten() for p in start.parameters()])
    return origin + torch.linalg.solve(X.T @ X + len(x) * DECAY * torch.eye(6, dtype=x.dtype), X.T @ (y - X @ origin))


def linear_case(forget: int = 12) -> tuple[Case, torch.Tensor]:
    """A ridge-trained linear model, and the weights of the same training without the forget rows."""
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, generator=rng).double() for shape in ((ROWS, 5), (ROWS,)))
    y[:forget] += 3.0
    case = Case(line(), TensorData(inputs=x, labels=y), requests.samples(range(forget)), task=Regression(error="mse"),
                build=line)  # fmt: skip
    start = case.fresh(7)
    trained = line()
    nn.utils.vector_to_parameters(closed_form(start, x, y), trained.parameters())
    return case.with_(model=trained), closed_form(start, x[forget:], y[forget:])


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_on_a_linear_model_it_is_the_retrained_model():
    case, retrained = linear_case()
    outcome = unlearn(case, "ntk_forgetting", initial_seed=7, weight_decay=DECAY, floor=None)
    assert (retrained - weights(case.model)).norm() > 0.1
    assert torch.allclose(weights(outcome.model), retrained, rtol=0, atol=1e-10)
    assert outcome.record["notes"]["scale"] == pytest.approx(1.0, abs=1e-9)


def test_the_official_codes_angle_rule_triples_an_exact_step():
    """It measures the prediction's error against w(D_r) for a model that was trained on D."""
    case, retrained = linear_case()
    outcome = unlearn(case, "ntk_forgetting", initial_seed=7, weight_decay=DECAY, scale="code", floor=None)
    step = weights(outcome.model) - weights(case.model)
    assert torch.allclose(step, 3 * (retrained - weights(case.model)), atol=1e-9)


def test_without_a_start_it_is_the_newton_step_as_the_pull_vanishes():
    """Linearised at the least-squares optimum, w(D) is 0 and w(D_r) leads to the optimum of the retain rows."""
    case, _ = linear_case()
    x, y = case.data.column("inputs"), case.data.column("labels")
    X = torch.cat([x, torch.ones(ROWS, 1, dtype=x.dtype)], 1)
    nn.utils.vector_to_parameters(torch.linalg.lstsq(X, y[:, None]).solution.flatten(), case.model.parameters())
    outcome = unlearn(case, "ntk_forgetting", weight_decay=1e-10, floor=None)
    expected = torch.linalg.lstsq(X[12:], y[12:, None]).solution.flatten()
    assert torch.allclose(weights(outcome.model), expected, atol=1e-6)


def test_the_move_solves_the_primal_ridge_system():
    rng = torch.Generator().manual_seed(1)
    G, r = torch.randn(9, 14, generator=rng).double(), torch.randn(9, generator=rng).double()
    w = ridge_move(G @ G.T, G, r, 0.3)
    assert torch.allclose(G.T @ (G @ w + r) + 0.3 * w, torch.zeros(14, dtype=torch.float64), atol=1e-10)


def test_jacobian_and_residual_equal_the_slow_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    case = Case(model, TensorData(inputs=x, labels=y), requests.samples([1, 4]))
    bench = Workbench(case, model, 0, torch.device("cpu"))
    G, residual = tangent(bench, model, case.split("forget"), [n for n, _ in model.named_parameters()], chunk=1)
    rows = []
    for i in (1, 4):
        for k in range(3):
            grads = torch.autograd.grad(model(x[i : i + 1])[0, k], list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
    assert torch.allclose(G, torch.stack(rows), atol=1e-12)
    assert torch.allclose(residual, (model(x[[1, 4]]).softmax(1) - F.one_hot(y[[1, 4]], 3)).flatten())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_angle_rule_is_the_trapezium_in_one_line(sign):
    """The published rule goes by cases: 2 cos(angle) where the inner product is positive, 2 sin(angle - 90 deg) else."""
    delta, error = torch.tensor([1.0, 2.0, 0.5]), sign * torch.tensor([2.0, -0.3, 4.0])
    inner = float(delta @ error / delta.norm() / error.norm())
    trig = math.cos(math.acos(inner)) if inner >= 0 else math.sin(math.acos(inner) - math.pi / 2)
    published = float((delta.norm() + 2 * trig * error.norm()) / delta.norm())
    assert angle_scale(delta, error) == pytest.approx(published, rel=1e-6)
    assert angle_scale(torch.zeros(3), error) == 1.0


def test_frozen_weights_are_the_originals_at_the_start_too():
    case, _ = linear_case()
    case.model.bias.requires_grad_(False)
    bench = Workbench(case, case.model, 0, torch.device("cpu"))
    start = fresh_start(bench, 7)
    assert torch.equal(start.bias, case.model.bias) and not torch.equal(start.weight, case.model.weight)
