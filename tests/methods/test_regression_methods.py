"""Blindspot and Gaussian-Amnesiac: the card's order of Wasserstein distances, and one step against arithmetic by
hand."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from torch import nn

from expunge import Case, Optimizer, Plan, Regression, TensorData, Term, requests, unlearn
from expunge.engine import Workbench, run_plan
from expunge.errors import UnmetNeed
from expunge.methods.registry import find
from expunge.parts.objectives import fit, relabel
from toys import mlp, toy

BLINDSPOT = {"epochs": 5, "batch_size": 32, "proxy_epochs": 10}


def predictions(case: Case, model: nn.Module, split: str = "forget") -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([case.task.forward(model.eval(), b).prediction for b in case.split(split).batches()])


def w1(case: Case, model: nn.Module, retrained: nn.Module) -> float:
    return float(wasserstein_distance(predictions(case, model).numpy(), predictions(case, retrained).numpy()))


def test_blindspot_is_nearest_to_retrained():
    t = toy("regression")
    case = t.case
    fine_tune = Plan(Term(fit(), on="retain"), optimizer=Optimizer("adam", lr=1e-3), batch_size=32, epochs=5)
    tuned, blind = unlearn(case, fine_tune).model, unlearn(case, "blindspot", **BLINDSPOT).model
    gauss = unlearn(case, "gaussian_amnesiac", epochs=5, batch_size=32).model
    original = w1(case, case.model, t.retrained)
    assert w1(case, blind, t.retrained) < 0.5 * w1(case, tuned, t.retrained)
    assert w1(case, tuned, t.retrained) < original
    assert w1(case, gauss, t.retrained) < 0.5 * original
    kept = {name: t.measure(m, "test")["mae"] for name, m in (("retrained", t.retrained), ("blind", blind))}
    assert kept["blind"] <= 1.1 * kept["retrained"]
    assert t.measure(blind, "holdout")["mae"] >= 0.9 * t.measure(t.retrained, "holdout")["mae"]
    alone = unlearn(case, "blindspot", lam=0.0, **BLINDSPOT).model
    assert w1(case, blind, t.retrained) <= w1(case, alone, t.retrained) + 0.1


def test_blindspot_under_squared_error_moves_towards_retrained():
    t = toy("regression")
    case = t.case.with_(task=Regression(error="mse"))
    outcome = unlearn(case, "blindspot", **BLINDSPOT)
    assert w1(case, outcome.model, t.retrained) < w1(case, case.model, t.retrained)
    assert "attention(proxy; 1,3)" in outcome.formula  # hidden activations were found


def tiny(error: str = "mse") -> Case:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 10, generator=rng), torch.randn(30, generator=rng)
    torch.manual_seed(0)
    return Case(
        mlp(10, (8, 6), 1), TensorData(inputs=x, labels=y), requests.samples(range(10)), task=Regression(error=error)
    )


@pytest.mark.parametrize("error", ["mse", "l1"])
def test_one_blindspot_step_by_the_formula(error: str):
    """(1 - c) L_r + c (loss(M(x_f), B(x_f)) + lam sum_l d(a_l, b_l)), one Adam step on all 30 rows."""
    case, lam = tiny(error), 50.0
    student = find("blindspot").configure(lam=lam, batch_size=30).action(case).phases[1]
    torch.manual_seed(5)
    proxy = mlp(10, (8, 6), 1)
    bench = Workbench(case, deepcopy(case.model), 0)
    bench.references.add("proxy", deepcopy(proxy))
    run_plan(student, bench)

    mine, x, y = deepcopy(case.model), case.data.columns["inputs"], case.data.columns["labels"]
    loss = F.mse_loss if error == "mse" else F.l1_loss

    def parts(model: nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        a1 = model[:2](rows)
        a2 = model[2:4](a1)
        return model[4](a2).squeeze(1), [a1, a2]

    c = 10 / 30
    own, own_layers = parts(mine, x[:10])
    with torch.no_grad():
        other, other_layers = parts(proxy, x[:10])
    distance = sum(
        (F.normalize(a.pow(2), dim=1) - F.normalize(b.pow(2), dim=1)).pow(2).mean()
        for a, b in zip(own_layers, other_layers, strict=True)
    )
    total = (1 - c) * loss(parts(mine, x[10:])[0], y[10:]) + c * (loss(own, other) + lam * distance)
    adam = torch.optim.Adam(mine.parameters(), lr=1e-3)
    total.backward()
    adam.step()
    for p, q in zip(bench.model.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-6)


def test_the_proxy_never_sees_the_forget_rows():
    """Whatever the forget rows hold, the proxy is the same network."""
    states = []
    for shift in (0.0, 100.0):
        case = tiny()
        y = case.data.columns["labels"].clone()
        y[:10] += shift
        case = case.with_(data=case.data.replaced(labels=y))
        bench = Workbench(case, deepcopy(case.model), 0)
        run_plan(find("blindspot").configure().action(case).phases[0], bench)
        states.append(bench.networks["proxy"].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not torch.equal(next(iter(states[0].values())), next(iter(case.model.state_dict().values())))


def test_gaussian_targets_are_drawn_once_from_all_targets():
    t = toy("regression")
    bench = Workbench(t.case, t.case.model, 0)
    table = relabel("marginal", draw="once").prepare(bench, "forget")
    ids, y = t.case.split("forget").ids, t.case.data.columns["labels"]
    new = table[ids]
    assert torch.equal(new, relabel("marginal", draw="once").prepare(bench, "forget")[ids])
    # mean and spread of ALL targets, not of the forget rows (all below 8): 4 standard errors
    error = 4 * float(y.std()) / len(ids) ** 0.5
    assert abs(float(new.mean() - y.mean())) < error and abs(float(new.std() - y.std())) < error
    assert float(y[ids].mean()) < float(y.mean()) - error
    plan = find("gaussian_amnesiac").configure().action(t.case)
    assert plan.rhythm == "mixed" and "once" in str(plan)


def test_gaussian_amnesiac_is_for_regression():
    with pytest.raises(UnmetNeed, match="regression"):
        unlearn(toy("class").case, "gaussian_amnesiac")
