"""Task vectors against a closed form and against fine-tuning itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge import Case, Optimizer, Plan, Term, requests, unlearn
from expunge.parts import fit
from toys import toy


def linear_case() -> Case:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=g), torch.randint(3, (20,), generator=g)
    torch.manual_seed(0)
    return Case(nn.Linear(4, 3), (x, y), requests.samples(range(6)))


def test_one_step_by_hand():
    case = linear_case()
    outcome = unlearn(case, "task_vector", floor=None, alpha=3.0, lr=0.1, epochs=1, optimizer="sgd", clip=None)
    x, y = case.data.column("inputs")[:6], case.data.column("labels")[:6]
    model = copy.deepcopy(case.model)
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    # theta_r = theta - lr g, so theta - 3 (theta_r - theta) = theta + 3 lr g: ascent
    for before, g, after in zip(model.parameters(), gradient, outcome.model.parameters(), strict=True):
        assert torch.allclose(after, before + 3.0 * 0.1 * g, atol=1e-6)
    length = 0.1 * torch.cat([g.flatten() for g in gradient]).norm()
    assert outcome.record["notes"]["task_vector_length"] == pytest.approx(float(length), rel=1e-4)


def test_no_length_changes_nothing_and_the_start_is_the_original():
    case = linear_case()
    outcome = unlearn(case, "task_vector", floor=None, alpha=0.0, lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(case.model.parameters(), outcome.model.parameters(), strict=True))


def test_the_vector_is_that_of_the_same_plan_on_the_model_itself():
    t = toy("class")
    settings = {"lr": 0.03, "epochs": 3, "batch_size": 32}
    outcome = unlearn(t.case, "task_vector", floor=None, alpha=5.0, optimizer="sgd", clip=None, **settings)
    plan = Plan(Term(fit(), "forget"), mode="eval", optimizer=Optimizer("sgd", lr=0.03), epochs=3, batch_size=32)
    tuned = unlearn(t.case, plan, floor=None).model
    for name, theta in t.original.named_parameters():
        expected = theta - 5.0 * (tuned.get_parameter(name) - theta)
        assert torch.allclose(outcome.model.get_parameter(name), expected, atol=1e-5)


def test_forgetting_grows_with_the_length_and_utility_pays():
    t = toy("class")
    losses, kept = [], []
    for alpha in (1.0, 2.0, 5.0, 10.0):
        model = unlearn(
            t.case, "task_vector", floor=None, alpha=alpha, lr=0.05, optimizer="sgd", clip=None, batch_size=32
        ).model
        losses.append(t.measure(model, "forget")["loss"])
        kept.append(t.accuracy(model, "retain"))
    assert losses == sorted(losses) and losses[0] > t.measure(t.original, "forget")["loss"]
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0] - 0.1
