"""Smoothers of the forget loss (2502.05374): each against its equation, with the faults of the official code named."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from expunge import Case, Optimizer, Plan, Term, requests, unlearn
from expunge.engine import Workbench, run_plan
from expunge.parts import ascend, average, curvature, fit, gradient_penalty, relabel, sam, smooth, steps
from toys import toy

RNG = torch.Generator().manual_seed(0)


class Problem:
    """A small smooth network in float64. loss(values): of the network at these weights; take(): the gradient where it is."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.x, self.y = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))
        self.parameters = list(self.model.parameters())
        self.names = [n for n, _ in self.model.named_parameters()]

    def loss(self, values):
        return -F.cross_entropy(
            functional_call(self.model, dict(zip(self.names, values, strict=True)), (self.x,)), self.y
        )

    def take(self):
        return list(torch.autograd.grad(self.loss(self.parameters), self.parameters))

    def leaves(self):
        return [p.detach().clone().requires_grad_(True) for p in self.parameters]


def joint(gradients):
    return torch.cat([g.reshape(-1) for g in gradients])


def test_sam_moves_along_the_gradient_of_all_weights_together():
    p = Problem()
    g = p.take()
    got = joint(sam(0.3).gradient(p.take, p.parameters, RNG))

    def at(scale):
        values = [(v + 0.3 * d / scale(d)).detach().requires_grad_(True) for v, d in zip(p.parameters, g, strict=True)]
        return joint(torch.autograd.grad(p.loss(values), values))

    assert torch.allclose(got, at(lambda d: joint(g).norm()), atol=1e-12)
    assert not torch.allclose(got, at(lambda d: d.norm()), atol=1e-3)  # a norm for each layer is another method


def test_gradient_penalty_is_the_double_backward():
    """The official penalty is built with .item() and has no gradient: it would give g itself."""
    p, lam = Problem(), 0.2
    values = p.leaves()
    g = torch.autograd.grad(p.loss(values), values, create_graph=True)
    exact = joint(torch.autograd.grad(p.loss(values) + lam * joint(g).norm(), values))
    got = joint(gradient_penalty(lam, mu=1e-4).gradient(p.take, p.parameters, RNG))
    assert torch.allclose(got, exact, atol=1e-4)
    assert (got - joint(p.take())).norm() > 0.05


def test_curvature_is_the_double_backward():
    """The official code back-propagates the forget loss once more, so that g counts twice, and its penalty is a constant."""
    p, lam, mu = Problem(), 0.5, 0.05
    values = p.leaves()
    g = torch.autograd.grad(p.loss(values), values, create_graph=True)
    fixed = [d.detach() / joint(g).norm().detach() for d in g]
    moved = [v + mu * d for v, d in zip(values, fixed, strict=True)]
    ahead = torch.autograd.grad(p.loss(moved), moved, create_graph=True)
    change = (joint(ahead) - joint(g)).norm()
    exact = joint(torch.autograd.grad(p.loss(values) + lam * change, values))
    got = joint(curvature(lam, mu).gradient(p.take, p.parameters, RNG))
    assert torch.allclose(got, exact, atol=1e-3 * float(exact.norm()))
    plain = joint(p.take())
    assert (got - plain).norm() > 5e-3 and (got - 2 * plain).norm() > 0.5 * plain.norm()


@pytest.mark.parametrize("adversary", [sam(0.1), smooth(0.1), gradient_penalty(), curvature()])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(adversary, kind):
    """Adding and subtracting rounds, in bfloat16 above all; a saved copy does not."""
    model = nn.Linear(50, 3).to(kind)
    x, y = torch.randn(8, 50).to(kind), torch.randint(0, 3, (8,))
    before = copy.deepcopy(model.state_dict())

    def take():
        return list(torch.autograd.grad(F.cross_entropy(model(x).float(), y), list(model.parameters())))

    for _ in range(5):
        adversary.gradient(take, list(model.parameters()), RNG)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def small_case(dropout: float = 0.0) -> Case:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 5, generator=g), torch.randint(0, 3, (48,), generator=g)
    torch.manual_seed(0)
    return Case(
        nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 3)),
        (x, y),
        requests.samples(range(12)),
    )


def after(case: Case, *terms: Term, **settings) -> torch.Tensor:
    bench = Workbench(case, copy.deepcopy(case.model))
    run_plan(Plan(*terms, optimizer=Optimizer("sgd", lr=0.1), epochs=3, batch_size=6, **settings), bench)
    return torch.cat([p.detach().reshape(-1) for p in bench.model.parameters()])


@pytest.mark.parametrize("none", [sam(0.0), smooth(0.0, draws=1), gradient_penalty(0.0), curvature(0.0)])
def test_a_smoother_of_no_strength_is_the_base_method(none):
    case = small_case()
    terms = Term(ascend(), "forget"), Term(fit(), "retain")
    assert torch.allclose(after(case, *terms), after(case, *terms, adversary=none), atol=1e-6)


@pytest.mark.parametrize("forget", [ascend(), relabel()])
def test_dropout_and_random_answers_are_the_same_in_all_passes(forget):
    """The second pass of SAM decides the update: with a mask or a relabelling of its own it would not be the base method's."""
    case = small_case(dropout=0.5)
    terms = Term(forget, "forget"), Term(fit(), "retain")
    assert torch.allclose(after(case, *terms), after(case, *terms, adversary=sam(0.0)), atol=1e-6)
    # the penalty divides the difference of two passes by mu: unlike passes would be noise a thousand times over
    assert torch.allclose(after(case, *terms), after(case, *terms, adversary=gradient_penalty(1e-4, 1e-7)), atol=2e-2)


def test_smooth_npo_composes_base_and_smoother_by_name():
    case = toy("class").case
    from expunge.methods import find

    def formula(**settings):
        return str(find("smooth_npo").configure(**settings).action(case))

    assert (
        formula()
        == "min npo(β=0.1)[forget] + loss[retain] against sam(ρ=0.01) by adamw(lr=5e-06, linear) for 10 epochs"
    )
    assert "against gradient_penalty(λ=0.01)" in formula(smoother="gp")
    assert "against curvature(λ=0.01)" in formula(smoother="cr") and "against smooth(σ=0.0001)" in formula(
        smoother="rs"
    )
    assert formula(smoother="wa").endswith("average(from 0.8, every 5)") and "against" not in formula(smoother="wa")
    assert "steer" in formula(base="rmu") and "-loss[forget]" in formula(base="grad_diff")


def test_weight_averaging_is_the_mean_of_the_last_snapshots():
    t = toy("class")
    settings = {"lr": 1e-3, "batch_size": 16, "epochs": 5, "floor": None}  # 60 rows: 4 updates per epoch, 20 in all
    wa = unlearn(t.case, "smooth_npo", smoother="wa", every=2, **settings)
    assert wa.record["updates"] == 20
    plain = wa.action.with_(average=None)
    ends = [unlearn(t.case, plain.with_(stop=steps(k)), floor=None).model.state_dict() for k in (16, 18, 20)]
    for key, value in wa.model.state_dict().items():
        assert torch.allclose(value, torch.stack([e[key] for e in ends]).mean(0), atol=1e-6)
    assert average(0.8, 2).takes(16, 20) and not average(0.8, 2).takes(15, 20)
