"""LAF and LAF+R: parts against arithmetic by hand, no label ever read, the card's inequalities on digits."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge import Case, Optimizer, Plan, TensorData, Term, Training, requests, unlearn
from expunge.engine import Workbench, fit, run_plan
from expunge.errors import BadModel
from expunge.parts.architecture import hidden_layers, last_linear, representation, width
from expunge.parts.objectives import fit as fit_term
from expunge.parts.objectives.density import VAE, align, atypical, bounded, contrast, normal_divergence, typical
from expunge.parts.step import capturing
from expunge.tasks import Classification
from toys import digits

SETTINGS = {"lr_unlearn": 2e-4, "lr_align": 2e-4, "tau": 5.0, "hidden": (64, 32)}
"""The card's settings for digits; the official step sizes do nothing in so few steps."""


def build() -> nn.Sequential:
    """The official head's shape: no activation between the representation (output of layer 2) and the output layer."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.Linear(128, 10))


class Secret(TensorData):
    """A table whose labels vanish once `hidden` is set: whoever reads them then gets a KeyError."""

    hidden = False

    def fetch(self, ids):
        batch = super().fetch(ids)
        if self.hidden:
            del batch.columns["labels"]
        return batch

    def column(self, name):
        assert not (self.hidden and name == "labels"), "labels were read"
        return super().column(name)


@cache
def card_case() -> Case:
    x, y, x_test, y_test = digits(1000)
    recipe = Training(epochs=20, batch_size=32, optimizer=Optimizer("adam", lr=1e-3, weight_decay=1e-4))
    case = Case(build(), (x, y), requests.label(0), test=(x_test, y_test), recipe=recipe, build=build)
    return case.with_(model=fit(case, "train", 0))


def accuracy(case: Case, model: nn.Module, split: str) -> float:
    return 100 * case.task.evaluate(model, case.split(split).batches())["accuracy"]


# -- the card's inequalities -------------------------------------------------------------------------------------------
def test_forgets_without_labels_and_a_benign_epoch_brings_it_back():
    case = card_case()
    outcome = unlearn(case, "laf", **SETTINGS)
    assert outcome.warnings == []
    assert accuracy(case, outcome.model, "holdout") <= 15  # unseen rows of the forgotten class
    assert accuracy(case, outcome.model, "test") >= 92
    forgotten = accuracy(case, outcome.model, "forget")
    assert forgotten <= 10
    relearn = Plan(Term(fit_term(), on="retain"), optimizer=Optimizer("adam", lr=1e-3), batch_size=32, epochs=1)
    relearned = unlearn(case.with_(model=outcome.model), relearn, floor=None)
    assert accuracy(case, relearned.model, "forget") >= forgotten + 20  # suppression, not removal
    repaired = unlearn(case, "laf_r", **SETTINGS)
    assert accuracy(case, repaired.model, "forget") > forgotten
    assert accuracy(case, repaired.model, "test") > accuracy(case, outcome.model, "test")


def test_repair_fixes_mislabelled_training():
    """60% of classes 0..4 mislabelled: LAF alone does not help, LAF+R gains at least five points on clean test rows."""
    x, y, x_test, y_test = digits(600)
    rng = torch.Generator().manual_seed(0)
    bad = ((y < 5) & (torch.rand(len(y), generator=rng) < 0.6)).nonzero().squeeze(1)
    wrong = y.clone()
    wrong[bad] = (y[bad] + torch.randint(1, 10, (len(bad),), generator=rng)) % 10
    recipe = Training(epochs=40, batch_size=32, optimizer=Optimizer("adam", lr=2e-3))
    case = Case(build(), (x, wrong), requests.samples(bad.tolist()), test=(x_test, y_test), recipe=recipe, build=build)
    case = case.with_(model=fit(case, "train", 0))
    repaired = unlearn(case, "laf_r", epochs=3, **SETTINGS)
    assert accuracy(case, repaired.model, "test") >= accuracy(case, case.model, "test") + 5


# -- no label is read --------------------------------------------------------------------------------------------------
def small(data: TensorData) -> Case:
    torch.manual_seed(0)
    return Case(build(), data, requests.samples(range(40)), build=build)


def test_runs_where_labels_are_gone():
    x, y, *_ = digits(200)
    data = Secret(inputs=x, labels=y)
    case = small(data)
    assert len(case.split("forget")) == 40
    data.hidden = True
    outcome = unlearn(case, "laf", epochs=1, density_epochs=1, floor=None)
    assert outcome.record["changed_fraction"] > 0
    with pytest.raises(KeyError):  # the trap works: the repair needs labels
        unlearn(case, "laf_r", epochs=1, density_epochs=1, floor=None)


def test_other_labels_give_the_same_tensors():
    x, y, *_ = digits(200)
    a, b = (
        unlearn(small(TensorData(inputs=x, labels=labels)), "laf", epochs=1, floor=None) for labels in (y, (y + 3) % 10)
    )
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


# -- one step against the formula --------------------------------------------------------------------------------------
def test_one_update_is_two_adam_steps_by_the_formula():
    """phi push by one Adam, then the alignment at the moved weights by another; plain torch beside it."""
    x, y, *_ = digits(40)
    torch.manual_seed(1)
    case = Case(build(), (x, y), requests.samples(range(20)), build=build)
    lr_a, lr_b, tau = 1e-3, 2e-3, 5.0
    vae_all, vae_forget = VAE(128, 4, (16, 8)), VAE(128, 4, (16, 8))
    plan = Plan(
        Term(typical("2", "d"), on="retain"), Term(atypical("2", "f"), on="forget"),
        Term(align("2", tau), on="retain", optimizer=Optimizer("adam", lr=lr_b)),
        optimizer=Optimizer("adam", lr=lr_a), batch_size=20, epoch_of="forget", mode="eval",
    )  # fmt: skip
    original, mine = case.model, deepcopy(case.model)
    bench = Workbench(case, deepcopy(case.model), 0)
    for name, vae in (("d", vae_all), ("f", vae_forget)):
        vae.sample = lambda e, rng, vae=vae: vae(e, torch.zeros(len(e), 4))  # no noise: comparable by hand
        bench.references.add(name, vae)
    run_plan(plan, bench)

    retain, forget = x[20:], x[:20]
    adam_a, adam_b = torch.optim.Adam(mine.parameters(), lr=lr_a), torch.optim.Adam(mine.parameters(), lr=lr_b)

    def g(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return model[:3](rows)

    def phi(vae: VAE, e: torch.Tensor) -> torch.Tensor:
        q = (vae(e, torch.zeros(len(e), 4))[0] - e).pow(2).sum(1)
        return torch.exp(q / (q + 1)).sum()

    (phi(vae_all, g(mine, retain)) - phi(vae_forget, g(mine, forget))).backward()
    adam_a.step()
    adam_b.zero_grad()
    c_s = 1 - F.cosine_similarity(g(mine, retain), g(original, retain).detach())
    c_u = 1 - F.cosine_similarity(g(mine, forget), g(original, forget).detach())
    torch.log(c_s.exp() / (c_u / tau).exp().sum()).sum().backward()
    adam_b.step()
    for p, q in zip(bench.model.parameters(), mine.parameters(), strict=True):
        # Adam's first step is lr * sign: entries whose gradient is zero up to rounding may differ in sign
        assert ((p - q).abs() > 1e-6).float().mean() < 1e-3
    assert torch.equal(bench.model[3].weight, original[3].weight)  # the head gets no gradient


# -- parts -------------------------------------------------------------------------------------------------------------
def test_bounded_push_values():
    q = torch.tensor([0.0, 1.0, 1e9])
    assert torch.allclose(bounded(q), torch.tensor([1.0, math.exp(0.5), math.e]))


def test_contrast_is_the_papers_log_ratio():
    keep, push, tau = torch.rand(5), torch.rand(3), 5.0
    assert torch.allclose(contrast(keep, push, tau), torch.log(keep.exp() / (push / tau).exp().sum()), atol=1e-6)


def test_normal_divergence_against_torch():
    mean, log_variance = torch.randn(4, 3), torch.randn(4, 3)
    p = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    truth = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(normal_divergence(mean, log_variance), truth, atol=1e-5)


def test_density_learns_and_tells_known_from_unknown():
    torch.manual_seed(0)
    basis = torch.randn(2, 16)
    vae = VAE(16, 2, (32, 16))
    adam = torch.optim.Adam(vae.parameters(), lr=3e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(400):
        e = torch.randn(64, 2, generator=rng) @ basis
        out, mean, log_variance = vae.sample(e, rng)
        loss = ((out - e).square().sum(1) + 0.025 * normal_divergence(mean, log_variance)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    known, unknown = torch.randn(200, 2, generator=rng) @ basis, torch.randn(200, 16, generator=rng) * 2
    with torch.no_grad():
        error = [float((vae.sample(e, rng)[0] - e).square().sum(1).mean()) for e in (known, unknown)]
    assert error[0] < 0.2 * float(known.square().sum(1).mean()) and error[1] > 5 * error[0]


def test_sigmoid_decoder_cannot_reach_signed_values():
    out = VAE(8, 2, (4, 4), "sigmoid")(torch.randn(5, 8) * 10, torch.zeros(5, 2))[0]
    assert out.min() >= 0 and out.max() <= 1


# -- finding layers ----------------------------------------------------------------------------------------------------
class Functional(nn.Module):
    """Registered in another order than called, activations without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.first, self.second = nn.Linear(6, 3), nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def test_layers_follow_the_forward_pass():
    data, task, model = (
        TensorData(inputs=torch.rand(3, 4), labels=torch.zeros(3, dtype=torch.int64)),
        Classification(),
        Functional(),
    )
    assert last_linear(task, model, data) == "head"
    assert hidden_layers(task, model, data) == ("first", "second")
    assert width(task, model, data, representation(task, model, data)) == 6
    with capturing(model, ["head.input"]) as seen:
        model(data.columns["inputs"])
    assert torch.equal(seen["head.input"], F.relu(model.second(F.relu(model.first(data.columns["inputs"])))))
    mlp = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), nn.Softmax(-1))
    assert hidden_layers(task, mlp, data) == ("1", "3")
    with pytest.raises(BadModel, match="nn.Linear"):
        last_linear(task, nn.Sequential(nn.Flatten(), nn.ReLU()), data)
