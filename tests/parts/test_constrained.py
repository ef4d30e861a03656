"""Balances with constraints, against their formulas and against the loops they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from expunge import Case, Optimizer, TensorData, Term, requests, unlearn
from expunge.parts import ascend, fit
from expunge.parts.balances import Around, Sum
from expunge.parts.constrained import dual_weights, preserve, remembered, value_bound
from expunge.parts.plan import Plan

NAMES = ["forget", "forget"]


def pair(seed: int = 0, sizes: tuple[int, ...] = (40, 7, 3)) -> tuple[torch.Tensor, Around]:
    return torch.randn(2, sum(sizes), generator=torch.Generator().manual_seed(seed)), Around(sizes)


@pytest.mark.parametrize("seed", range(5))
def test_preserve_leaves_nothing_against_the_protected_gradient_in_any_tensor(seed):
    g, around = pair(seed)
    moved = preserve().combine(g, NAMES, around)
    clipped = g / g.norm(dim=1, keepdim=True)  # both are longer than 1, and are clipped before the surgery
    against = 0
    for new, old, guard in zip(*(v.split(around.sizes) for v in (moved, clipped[0], clipped[1])), strict=True):
        if torch.dot(old, guard) >= 0:
            assert torch.allclose(new, old, atol=1e-6)  # one-sided
        else:
            against += 1
            assert torch.dot(new, guard).abs() < 1e-6
            assert torch.allclose(new, old - torch.dot(old, guard) / guard.dot(guard) * guard, atol=1e-6)
    assert against  # not the whole vector's: a tensor may oppose where the whole does not


def test_preserve_steps_the_forget_gradient_alone():
    g = torch.tensor([[0.3, 0.0], [0.0, 0.4]])
    assert torch.equal(preserve().combine(g, NAMES, Around((2,))), g[0])  # the sum with the protected one is (0.3, 0.4)
    assert torch.allclose(preserve(strength=0.0, clip=None).combine(-g.flip(0), NAMES, Around((2,))), -g[1])
    opposite = torch.stack([-g[1], g[1]])
    assert preserve().combine(opposite, NAMES, Around((2,))).norm() < 1e-6


def test_the_released_scaling_is_the_projection_only_for_a_unit_gradient():
    g = torch.tensor([[-0.6, 0.8], [1.0, 0.0]])
    released = preserve(clip=None, released=True)
    assert torch.allclose(released.combine(g, NAMES, Around((2,))), torch.tensor([0.0, 0.8]), atol=1e-6)
    short = torch.stack([0.1 * g[0], g[1]])
    over = released.combine(short, NAMES, Around((2,)))
    assert torch.allclose(over, torch.tensor([-0.06 + 0.6, 0.08]), atol=1e-6)  # ten times too far
    assert torch.allclose(preserve(clip=None).combine(short, NAMES, Around((2,))), torch.tensor([0.0, 0.08]), atol=1e-6)


def linear_case() -> Case:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long()
    torch.manual_seed(0)
    return Case(nn.Linear(5, 2), TensorData(inputs=x, labels=y), requests.samples(list(range(10))))


def test_the_dynamic_multiplier_is_bome_with_its_inner_steps_whatever_they_are():
    """Algorithm 1 of EraseDiff by hand: K inner steps from theta, the loss there, theta back, q = L_f - L_f*, one outer step."""
    case, eta, lr = linear_case(), 0.1, 0.1
    plan = Plan(Term(ascend(), on="forget"), Term(fit(), on="retain"), balance=value_bound(eta),
                optimizer=Optimizer("sgd", lr=lr), batch_size=64, epochs=1, mode="eval")  # fmt: skip
    ours = unlearn(case, plan, floor=None).model
    for inner in (0, 1, 5):
        model = copy.deepcopy(case.model)
        data = {n: case.split(n).data.fetch(case.split(n).ids) for n in ("forget", "retain")}

        def loss(name, net, data=data):
            return nn.functional.cross_entropy(net(data[name]["inputs"]), data[name]["labels"])

        best = copy.deepcopy(model)
        for _ in range(inner):
            grads = torch.autograd.grad(-loss("forget", best), best.parameters())
            with torch.no_grad():
                for p, g in zip(best.parameters(), grads, strict=True):
                    p -= lr * g
        target = -loss("forget", best).detach()
        q = torch.cat([g.flatten() for g in torch.autograd.grad(-loss("forget", model) - target, model.parameters())])
        r = torch.cat([g.flatten() for g in torch.autograd.grad(loss("retain", model), model.parameters())])
        lam = max(0.0, eta - float(torch.dot(q, r) / (q.norm() * r.norm())))
        assert lam > 0
        flat = nn.utils.parameters_to_vector(model.parameters()) - lr * (r + lam * q)
        assert torch.allclose(nn.utils.parameters_to_vector(ours.parameters()), flat, atol=1e-6)


def test_the_dynamic_multiplier_is_never_negative_and_rests_where_the_gradients_agree():
    bound = value_bound(0.1)
    g = torch.randn(2, 30, generator=torch.Generator().manual_seed(3))
    assert bound.multiplier(g[0], g[0]) == 0.0  # cosine 1
    assert bound.multiplier(g[0], -g[0]) == pytest.approx(1.1)
    assert bound.multiplier(g[0], torch.zeros(30)) == 0.0
    for seed in range(20):
        a, b = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        cosine = float(nn.functional.cosine_similarity(a, b, 0))
        assert bound.multiplier(a, b) == pytest.approx(max(0.0, 0.1 - cosine), abs=1e-6)
    both = torch.stack([g[0], g[1]])
    assert torch.allclose(bound.combine(both, ["retain", "forget"]), g[0] + bound.multiplier(g[0], g[1]) * g[1])


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_moves_against_no_remembered_gradient_however_small(scale, margin):
    """The official ridge of 1e-3 is a thousand times these products at scale 1e-3, and leaves the constraint unmet."""
    rng = torch.Generator().manual_seed(0)
    memory, g = scale * torch.randn(3, 20, generator=rng), scale * torch.randn(20, generator=rng)
    g = g - 2 * memory[0]  # opposed for certain
    v = torch.as_tensor(dual_weights(memory, g, margin), dtype=torch.float32)
    moved = g + v @ memory
    assert bool((v >= margin - 1e-9).all())
    assert bool((memory @ moved >= -1e-5 * scale**2).all())
    if margin == 0.0:  # the nearest such gradient: complementary slackness of the projection
        assert torch.allclose(v * (memory @ moved), torch.zeros(3), atol=1e-5 * scale**2)
    official = memory @ memory.T + 1e-3 * torch.eye(3)
    free = torch.linalg.solve(official, -memory @ g).clamp(min=margin)
    if scale == 1e-3 and margin == 0.0:
        assert bool((memory @ (g + free @ memory) < -0.1 * scale**2).any())


def test_the_memory_is_the_ascent_gradient_before_the_first_step_and_is_looked_at_every_so_often():
    case = linear_case()
    plan = {"optimizer": Optimizer("sgd", lr=0.05), "batch_size": 64, "epochs": 6, "mode": "eval"}
    keep = Term(fit(), on="retain")
    free = unlearn(case, Plan(keep, balance=Sum(), **plan), floor=None).model
    held = unlearn(case, Plan(keep, balance=remembered(ascend(), 1, every=1, batch_size=64), **plan), floor=None).model
    rows = case.split("forget").data.fetch(case.split("forget").ids)

    def loss(net):
        return float(nn.functional.cross_entropy(net(rows["inputs"]), rows["labels"]))

    assert loss(free) < loss(case.model) <= loss(held) + 1e-6  # fitting the rest fits these too, unless it may not
    rare = unlearn(
        case, Plan(keep, balance=remembered(ascend(), 1, every=100, batch_size=64), **plan), floor=None
    ).model
    assert loss(free) < loss(rare) < loss(held)  # acted in the first of six updates alone
