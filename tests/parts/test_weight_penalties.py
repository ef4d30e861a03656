"""Penalties on weights against closed forms: repulsion from copies, and the Fisher penalty."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge import Case, Optimizer, Plan, Regression, Term, requests
from expunge.engine import Workbench, execute
from expunge.errors import BadSetting, ExpungeWarning
from expunge.parts import average, fit
from expunge.parts.adversaries import moving_average
from expunge.parts.objectives.penalties import ewc, repel
from expunge.parts.references import References
from expunge.parts.step import Step
from expunge.tasks.base import Batch


class Two(nn.Module):
    """Two parameters of two sizes: w (2,) and b ()."""

    def __init__(self, w=(0.3, -0.2), b=0.5):
        super().__init__()
        self.w, self.b = (
            nn.Parameter(torch.tensor(w, dtype=torch.float64)),
            nn.Parameter(torch.tensor(b, dtype=torch.float64)),
        )

    def forward(self, inputs):
        return inputs @ self.w + self.b


def step_of(model: nn.Module, **copies: nn.Module) -> Step:
    references = References(Regression())
    for name, copy in copies.items():
        references.add(name, copy)
    batch = Batch(torch.arange(3), {"inputs": torch.zeros(3, 2, dtype=torch.float64)})
    return Step(model, Regression(), batch, references, torch.Generator())


def gradient(objective, model, **copies):
    value = objective(step_of(model, **copies))
    assert value.shape == (3,)
    return value.mean().detach(), torch.autograd.grad(value.mean(), [model.w, model.b])


@pytest.mark.parametrize("form", ["il2", "nl2", "el2"])
def test_repulsion_is_the_papers_formula(form):
    """d = ||theta - theta_N||^2; gradients -2 d_vec / d^2, -2 d_vec, -2 alpha d_vec exp(-alpha d)."""
    model, copy, alpha = Two(), Two((1.0, 0.4), -0.7), 0.6
    value, (gw, gb) = gradient(repel("negative", form, alpha, "sum"), model, negative=copy)
    dw, db = (model.w - copy.w).detach(), (model.b - copy.b).detach()
    d = (dw**2).sum() + db**2
    expected, slope = {
        "il2": (1 / d, -2 / d**2), "nl2": (-d, torch.tensor(-2.0)), "el2": (torch.exp(-alpha * d), -2 * alpha * torch.exp(-alpha * d)),
    }[form]  # fmt: skip
    assert torch.allclose(value, expected)
    assert torch.allclose(gw, slope * dw) and torch.allclose(gb, slope * db)


def test_the_mean_distance_counts_tensors_alike_and_official_is_its_multiple():
    model, one, two = Two(), Two((1.0, 0.4), -0.7), Two((0.0, 0.0), 0.0)

    def by_hand(copy):
        return (((model.w - copy.w) ** 2).mean() + (model.b - copy.b) ** 2) / 2

    d = (by_hand(one) + by_hand(two)) / 2
    assert torch.allclose(gradient(repel(("a", "b"), "nl2"), model, a=one, b=two)[0], -d)
    # the released code: sum over copies of mean squared differences, over tensors, times M / 2, over the number of tensors
    official = sum(((model.w - c.w) ** 2).mean() + (model.b - c.b) ** 2 for c in (one, two)) / 2 * (2 / 2)
    assert torch.allclose(gradient(repel(("a", "b"), "nl2", distance="official"), model, a=one, b=two)[0], -official)


@pytest.mark.parametrize("distance", ["mean", "sum"])
@pytest.mark.parametrize("form", ["il2", "nl2", "el2"])
def test_identical_copies_repel_as_one(form, distance):
    model, copy = Two(), Two((1.0, 0.4), -0.7)
    one = gradient(repel("a", form, 0.8, distance), model, a=copy)
    three = gradient(
        repel(("a", "b", "c"), form, 0.8, distance), model, a=copy, b=Two((1.0, 0.4), -0.7), c=Two((1.0, 0.4), -0.7)
    )
    assert torch.allclose(one[0], three[0]) and all(torch.allclose(x, y) for x, y in zip(one[1], three[1], strict=True))


def test_official_scaling_is_half_the_square_of_the_copies():
    model, copy = Two(), Two((1.0, 0.4), -0.7)
    mean = gradient(repel("a", "nl2"), model, a=copy)[0]
    official = gradient(
        repel(("a", "b", "c"), "nl2", distance="official"),
        model,
        a=copy,
        b=Two((1.0, 0.4), -0.7),
        c=Two((1.0, 0.4), -0.7),
    )[0]
    assert torch.allclose(official, 9 / 2 * mean)


def case_of(model: nn.Module, rows: int = 12) -> Case:
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.randn(rows, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return Case(model, (x, y), requests.samples([0, 1, 2]), task=Regression(error="mse"))


def test_fisher_is_the_mean_of_squared_gradients_row_by_row():
    """mse of w.x + b: gradients 2 e x and 2 e, in closed form; a batch's mean gradient squared would be smaller."""
    case = case_of(Two())
    bench = Workbench(case, Two())
    fisher = ewc(samples=12).prepare(bench, "forget")
    x, y = case.data.column("inputs"), case.data.column("labels")
    e = (Two()(x) - y).detach()
    assert torch.allclose(fisher["w"], ((2 * e[:, None] * x) ** 2).mean(0))
    assert torch.allclose(fisher["b"], ((2 * e) ** 2).mean())
    assert all(bool((f >= 0).all()) for f in fisher.values())


def test_fisher_is_of_the_named_parameters_alone_and_the_penalty_its_quadratic_form():
    case, bench = case_of(Two()), Workbench(case_of(Two()), Two())
    objective = ewc(samples=8, over="b")
    memory = objective.prepare(bench, "forget")
    assert list(memory) == ["b"]
    moved = Two((9.0, 9.0), 1.25)
    step = step_of(moved, original=case.model)
    step.scratch["memory"] = memory
    value = objective(step)
    assert torch.allclose(value, 0.5 * memory["b"] * 0.75**2 * torch.ones(3, dtype=torch.float64))
    with pytest.raises(BadSetting, match="expected a parameter name that matches conv"):
        ewc(over="conv*").prepare(bench, "forget")


def test_ewc_holds_what_matters_and_lets_go_what_does_not():
    """A heavy penalty on b alone: b stays, w moves."""
    plan = Plan(
        Term(fit(), "forget"),
        Term(ewc(over="b"), "forget", weight=1e6),
        optimizer=Optimizer("adam", lr=0.01),
        epochs=20,
    )
    model = execute(plan, case_of(Two()), floor=None).model
    assert abs(float(model.b.detach()) - 0.5) < 0.02 < float((model.w - Two().w).abs().max().detach())


def test_nl2_warns_that_nothing_bounds_it():
    from expunge.parts import Auxiliary

    copied = Plan(Term(fit(), "forget"), trains=Auxiliary("far", lambda case, seed: Two((1.0, 1.0), 1.0)), epochs=1)
    for form in ("nl2", "el2"):
        plan = Plan(phases=(copied, Plan(Term(fit(), "retain"), Term(repel("far", form), "retain"), epochs=1)))
        result = execute(plan, case_of(Two()), floor=None)
        assert any("nl2 repels without bound" in w for w in result.warnings) == (form == "nl2")
    assert issubclass(ExpungeWarning, UserWarning)


def test_the_moving_average_is_the_recursion_from_the_first_weights():
    case, seen = case_of(Two()), []
    plan = Plan(Term(fit(), "retain"), optimizer=Optimizer("sgd", lr=0.1), epochs=4, batch_size=4)

    for epochs in range(1, 5):  # the weights after each epoch's three updates, batch by batch through a stop
        for updates in range(1, 4):
            from expunge.parts import steps

            stop = steps(3 * (epochs - 1) + updates)
            seen.append(execute(plan.with_(stop=stop), case, floor=None).model.w.detach().clone())
    mean = Two().w.detach().clone()
    for w in seen:
        mean = 0.9 * mean + 0.1 * w
    got = execute(plan.with_(average=moving_average(0.9)), case, floor=None).model.w.detach()
    assert torch.allclose(got, mean)
    plain = execute(plan.with_(average=average()), case, floor=None).model.w.detach()
    assert torch.allclose(plain, torch.stack(seen).mean(0))
    assert moving_average(half_life=10).decay ** 10 == pytest.approx(0.5)
