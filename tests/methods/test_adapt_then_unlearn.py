"""Adapt-then-Unlearn and its baselines on the ring: a bare loop, equalities bit for bit, what is trained and what is not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from expunge import Optimizer, Plan, Term, unlearn
from expunge.audits.metrics.gan import diversity, pul
from expunge.engine import Workbench, execute, run_plan
from expunge.errors import UnmetNeed
from expunge.methods import find
from expunge.methods.tuned.adapt_then_unlearn import negative_adaptation
from expunge.parts.objectives.adversarial import deceive, discriminator
from expunge.tasks.gan import Gan
from gan_ring import FORGET, MODES, judge, retrained, ring_case, shares
from toys import toy

SHORT = {"steps": 12, "batch_size": 32, "lr": 1e-3, "r1": 1.0, "half_life": 600}
STAGES = SHORT | {"adapt_steps": 12, "copies": 2, "ewc": 1.0, "alpha": 300.0}


def same(a, b) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


class Fixed(Gan):
    """Latents that depend on their number alone, so that a loop written by hand draws the same."""

    def draw(self, model, count, rng):
        return torch.randn(count, self.size(model), generator=torch.Generator().manual_seed(count))


def test_gan_training_equals_a_bare_pytorch_loop():
    """Discriminator step, lazy R1 step by the same Adam, generator step, moving average; full batches."""
    case = ring_case().with_(task=Fixed())
    rows, updates, lr, every = len(case.split("retain")), 5, 1e-3, 2
    from expunge.parts.adversaries import moving_average

    plan = Plan(
        Term(deceive(), on="retain"), adversary=discriminator(lr=lr, penalty=3.0, every=every), epochs=updates,
        optimizer=Optimizer("adam", lr=lr, betas=(0.0, 0.99)), batch_size=rows, average=moving_average(0.8),
    )  # fmt: skip
    got = execute(plan, case, floor=None).model

    pair, x = copy.deepcopy(case.model).train(), case.data.column("inputs")[case.split("retain").ids]
    z = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    ratio = every / (every + 1)
    g = torch.optim.Adam(pair.generator.parameters(), lr=lr, betas=(0.0, 0.99))
    d = torch.optim.Adam(pair.discriminator.parameters(), lr=lr * ratio, betas=(0.0, 0.99**ratio))
    mean = [p.detach().clone() for p in pair.generator.parameters()]
    for t in range(updates):
        fake = pair.generator(z).detach()
        d.zero_grad()
        (F.softplus(-pair.discriminator(x)) + F.softplus(pair.discriminator(fake))).mean().backward()
        d.step()
        if t % every == 0:
            real = x.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(pair.discriminator(real).sum(), real, create_graph=True)
            d.zero_grad()
            (3.0 / 2 * slope.square().sum(1).mean() * every).backward()
            d.step()
        g.zero_grad()
        F.softplus(-pair.discriminator(pair.generator(z))).mean().backward()
        g.step()
        mean = [0.8 * m + 0.2 * p.detach() for m, p in zip(mean, pair.generator.parameters(), strict=True)]
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(got.generator.parameters(), mean, strict=True))
    pairs = zip(got.discriminator.parameters(), pair.discriminator.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in pairs)


def test_gamma_0_is_fine_tuning_on_the_positives_bit_for_bit():
    case = ring_case()
    without = unlearn(case, "adapt_then_unlearn", floor=None, gamma=0.0, **STAGES)
    assert same(without.model, unlearn(case, "fine_tune_positives", floor=None, **SHORT).model)
    assert "negative" not in without.formula and "exp" not in without.formula
    assert not same(without.model, unlearn(case, "adapt_then_unlearn", floor=None, gamma=0.3, **STAGES).model)


def test_fine_tuning_reads_no_negative():
    case, broken = ring_case(), ring_case()
    inputs = broken.data.column("inputs").clone()
    inputs[broken.split("forget").ids] = 99.0
    changed = broken.with_(data=broken.data.replaced(inputs=inputs))
    assert same(*(unlearn(c, "fine_tune_positives", floor=None, **SHORT).model for c in (case, changed)))


def test_the_copies_show_what_must_go_and_are_two():
    case = ring_case()
    bench = Workbench(case, copy.deepcopy(case.model), 0)
    shared = {
        "adapt_steps": 150,
        "negatives": 100,
        "ewc_weight": 1.0,
        "fisher_over": "generator.*",
        "batch_size": 32,
        "lr": 1e-3,
        "r1": 1.0,
    }
    plans = [negative_adaptation(case, i, **shared) for i in range(2)]
    run_plan(Plan(phases=tuple(plans)), bench)
    assert same(bench.model, case.model)  # stage 1 moves copies alone
    one, two = bench.networks["negative_0"], bench.networks["negative_1"]
    assert not same(one, two)
    for adapted in (one, two):
        assert float(shares(adapted)[FORGET]) > 0.9 > 0.5 > float(shares(case.model)[FORGET])
        assert not any(p.requires_grad for p in adapted.parameters())


def test_repulsion_leaves_the_copies_farther_behind_than_the_positives_alone_do():
    case = ring_case()

    def distance(gamma):
        plan = find("adapt_then_unlearn").configure(gamma=gamma, **STAGES).action(case)
        last = plan.phases[-1].with_(average=None)
        bench = Workbench(case, copy.deepcopy(case.model), 0)
        run_plan(Plan(phases=(*plan.phases[:-1], last)), bench)
        far = dict(bench.networks["negative_0"].named_parameters())
        moved = {n: p for n, p in bench.model.named_parameters() if n.startswith("generator")}
        return float(torch.stack([(p - far[n]).square().mean() for n, p in moved.items()]).mean().detach())

    weak, strong = distance(1e-9), distance(5.0)
    assert strong > 1.5 * weak


@pytest.mark.parametrize("form", ["el2", "il2", "nl2"])
def test_every_form_runs_and_nl2_alone_warns(form):
    outcome = unlearn(ring_case(), "adapt_then_unlearn", floor=None, form=form, gamma=1e-6, **STAGES)
    assert any("without bound" in w for w in outcome.warnings) == (form == "nl2")
    assert "copies" in outcome.formula


def test_nl2_with_a_large_weight_leaves_for_ever_and_says_so():
    """The repulsion's value falls without bound, update by update, where el2's saturates at zero."""
    values = {}
    for form in ("nl2", "el2"):
        outcome = unlearn(
            ring_case(), "adapt_then_unlearn", floor=None, form=form, gamma=1e4, **(STAGES | {"steps": 40})
        )
        key = next(k for k in outcome.record["history"][-1]["losses"] if "copies" in k)
        values[form] = [h["losses"][key] for h in outcome.record["history"] if h["phase"] == 2]
    assert values["nl2"][-1] < 10 * values["nl2"][5] < 0
    assert 0 <= values["el2"][-1] < values["el2"][0] <= 1


def test_extrapolation_is_the_vector_times_the_step():
    case, shared = ring_case(), {"adapt_steps": 12, "ewc": 1.0, "batch_size": 32, "lr": 1e-3, "r1": 1.0}
    one, two = (unlearn(case, "extrapolation", floor=None, step=s, **shared).model for s in (0.5, 1.5))
    for name, theta in case.model.named_parameters():
        a, b = one.get_parameter(name), two.get_parameter(name)
        assert torch.allclose(3 * (a - theta), b - theta, atol=1e-6)
        assert torch.equal(a, theta) == name.startswith("discriminator")


def test_the_ring_forgets_its_mode_without_collapse_and_without_any_training_data():
    """PUL at least 80, and not below fine-tuning's by more than noise: on the ring the discriminator alone finds what is not
    among the positives, so repulsion adds nothing here."""
    case = ring_case()
    budget = {"steps": 100, "batch_size": 32, "lr": 1e-3, "r1": 1.0, "half_life": 600}
    models = {
        "el2": unlearn(case, "adapt_then_unlearn", floor=None, gamma=0.05, alpha=300.0, adapt_steps=100, copies=1, ewc=1.0, **budget).model,
        "positives": unlearn(case, "fine_tune_positives", floor=None, **budget).model,
        "retrained": retrained(),
    }  # fmt: skip
    classes = {n: judge(Gan().sample(m, 2000, 5)).numpy() for n, m in {**models, "original": case.model}.items()}
    shown = {n: c == FORGET for n, c in classes.items()}
    found = {n: pul(shown["original"], shown[n]) for n in models}
    assert found["el2"] >= 80 and found["el2"] > found["positives"] - 5
    assert not diversity(classes["el2"], MODES, FORGET).collapsed
    assert np.mean(shown["original"]) > 0.2


def test_other_kinds_of_model_are_refused():
    with pytest.raises(UnmetNeed, match="serves gan"):
        unlearn(toy("class").case, "adapt_then_unlearn")
