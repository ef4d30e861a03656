"""The GAN task: its losses against the formulas, whose weights a loss moves, sampling, the judged split, and a ring of Gaussians."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge import Case, Plan, Term, requests, unlearn
from expunge.audits.metrics.gan import diversity
from expunge.cases.feedback import feedback, judge_digest, judged, own_samples, split_by
from expunge.engine import Workbench, execute
from expunge.errors import BadData, BadModel, BadRequest, BadSetting, UnmetNeed
from expunge.parts.objectives.adversarial import deceive, discriminator, lazily, path_length, r1, tell_apart
from expunge.parts.plan import Optimizer
from expunge.tasks.gan import Gan, GanPair, frechet
from gan_ring import (
    CENTRES,
    FORGET,
    MODES,
    RingGenerator,
    build,
    chances,
    judge,
    real_case,
    retrained,
    ring,
    ring_case,
    shares,
)


def pair(seed: int = 0) -> GanPair:
    torch.manual_seed(seed)
    return build()


def step_of(model, rows: int = 6, objective=None):
    case = Case(model, ring(rows + 2, 0), requests.samples([0]), task=Gan(), build=build)
    bench = Workbench(case, model)
    batch = case.task.prepare(bench.fill(case.data.fetch(torch.arange(rows))), torch.Generator().manual_seed(2))
    return bench.step(batch)


def test_losses_are_the_logistic_formulas():
    model, step = pair(), step_of(pair())
    z, x = step.batch["latents"], step.batch["inputs"]
    fake, real = model.discriminator(model.generator(z)).squeeze(1), model.discriminator(x).squeeze(1)
    assert torch.allclose(step.loss, torch.log1p(torch.exp(-fake)), atol=1e-6)
    task = step.task
    assert torch.allclose(task.log_likelihood(step.output, step.batch), torch.sigmoid(fake).log(), atol=1e-6)
    assert torch.allclose(task.contest(model, x, z), -torch.sigmoid(real).log() - torch.sigmoid(-fake).log(), atol=1e-5)
    assert torch.allclose(task.signals(step.output, step.batch)["margin"], real.double())
    assert torch.allclose(task.forget_score(step.output, step.batch), torch.sigmoid(real.double()))
    other = task.forward(pair(1), step.batch)
    by_hand = ((model.generator(z) - pair(1).generator(z)) ** 2).mean(1)
    assert torch.allclose(task.divergence(step.output, other, step.batch), by_hand)


def test_each_loss_moves_its_own_network_alone():
    for objective, moves in (
        (None, "generator"),
        (deceive(), "generator"),
        (tell_apart(), "discriminator"),
        (r1(), "discriminator"),
    ):
        model = pair()
        step = step_of(model)
        (step.loss if objective is None else objective(step)).mean().backward()
        got = {
            n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)
        }
        assert got == {moves}
        assert all(p.requires_grad for p in model.parameters())


def test_r1_is_half_the_squared_slope():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

        def forward(self, x):
            return x @ self.weight

    model = GanPair(RingGenerator(), Linear())
    assert torch.allclose(r1()(step_of(model)), torch.full((6,), 12.5))  # (9 + 16) / 2


def test_path_length_needs_styles_and_is_zero_for_even_steps():
    with pytest.raises(UnmetNeed, match="mapping and synthesis"):
        path_length()(step_of(pair()))

    class Even(RingGenerator):
        """Images whose slope in the style does not depend on it: every path has a length that only the noise decides."""

        def __init__(self):
            super().__init__()
            self.mapping, self.synthesis = nn.Identity(), nn.Linear(4, 2)

    model = GanPair(Even(), pair().discriminator)
    step = step_of(model, 64)
    value = path_length()(step)
    weight = model.generator.synthesis.weight
    draws = step.again().rng
    torch.randn(32, 4, generator=draws)
    noise = torch.randn(32, 2, generator=draws) / 2**0.5
    lengths = (noise @ weight).square().sum(1).sqrt()
    assert torch.allclose(value, ((lengths - lengths.mean()) ** 2).mean().expand(64), atol=1e-6)


def test_lazy_regularisation_scales_step_and_betas():
    made = lazily(Optimizer("adam", lr=0.002, betas=(0.0, 0.99)), 4)
    assert made.lr == pytest.approx(0.002 * 4 / 5) and made.betas == (0.0, pytest.approx(0.99 ** (4 / 5)))
    player = discriminator(lr=0.002)
    assert player.optimizer.lr == pytest.approx(0.002 * 16 / 17)
    assert [t.every for t in player.terms] == [1, 16] and player.terms[1].weight == 160


def test_frechet_is_the_closed_form_of_two_normals():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    white = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T
    first, second = white * torch.tensor([1.0, 2.0, 3.0]), white * 2.0 + torch.tensor([1.0, 0.0, -2.0])
    assert frechet(first, second) == pytest.approx(1 + 4 + (1 - 2) ** 2 + 0 + (3 - 2) ** 2, rel=1e-6)
    assert frechet(first, first) == pytest.approx(0, abs=1e-9)


def test_samples_are_a_function_of_the_seed_and_leave_no_trace():
    task, model = Gan(), pair().train()
    state = torch.random.get_rng_state()
    one, again, other = (
        task.sample(model, 700, 1),
        task.sample(model, 700, 1, batch_size=700),
        task.sample(model, 700, 2),
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state()) and model.training


def test_bad_pairs_are_refused_by_name():
    x = ring(8, 0)
    with pytest.raises(BadModel, match="expunge.GanPair"):
        Case(nn.Linear(4, 2), x, requests.samples([0]), task=Gan())
    nameless = GanPair(nn.Linear(4, 2), pair().discriminator)
    with pytest.raises(BadModel, match=r"Gan\(latent="):
        Case(nameless, x, requests.samples([0]), task=Gan())
    Case(nameless, x, requests.samples([0]), task=Gan(latent=4))
    with pytest.raises(BadData, match="the generator's shape"):
        Case(GanPair(nn.Linear(4, 3), pair().discriminator), x, requests.samples([0]), task=Gan(latent=4))
    with pytest.raises(UnmetNeed, match="adapt_then_unlearn"):
        step = step_of(pair())
        step.task.relabel(step.batch, step.rng)


# -- the judged split -----------------------------------------------------------------------------------------------------
def test_the_split_is_disjoint_covers_all_samples_and_keeps_its_threshold():
    model = real_case().model
    case = feedback(model, chances, FORGET, samples=300, threshold=0.3, seed=4)
    forget, retain = case.split("forget").ids, case.split("retain").ids
    assert not set(forget.tolist()) & set(retain.tolist()) and len(forget) + len(retain) == len(case.data) == 300
    told = case.notes["feedback"]
    assert told["threshold"] == 0.3 and told["negatives"] == len(forget) and told["positives"] == len(retain)
    probability = judged(chances, case.data.column("inputs"))[:, FORGET]
    assert bool((probability[forget] >= 0.3).all()) and bool((probability[retain] < 0.3).all())
    assert told["judge"] == judge_digest(chances) != judge_digest(judge)
    # a row's latent makes its image
    again = case.task.sample(model, 300, latents=case.data.column("latents"))
    assert torch.equal(again, case.data.column("inputs"))


def test_judges_may_answer_in_three_ways():
    points = CENTRES.repeat(3, 1)
    assert torch.equal(judged(judge, points).argmax(1), judged(chances, points).argmax(1))
    assert torch.equal(judged(lambda x: chances(x)[:, 1], points).argmax(1), (judge(points) == 1).long())
    with pytest.raises(BadSetting, match="apply softmax"):
        judged(lambda x: -torch.cdist(x, CENTRES), points)
    with pytest.raises(BadRequest, match="a class that the judge knows"):
        split_by(judged(chances, points), MODES, 0.5)
    with pytest.raises(BadRequest, match="draw more samples"):
        own_samples(real_case().model, lambda x: torch.zeros(len(x)).long() + (x[:, 0] > 99), 1, samples=20)


def test_samples_that_are_not_finite_are_dropped_and_counted():
    class Broken(RingGenerator):
        def forward(self, z):
            made = super().forward(z)
            return torch.where(z[:, :1] > 1.0, float("nan"), made)

    torch.manual_seed(0)
    model = GanPair(Broken(), build().discriminator)
    table, told = own_samples(model, lambda x: x[:, 0] > x[:, 0].median(), 1, samples=200)
    assert (
        told["dropped"] > 10
        and len(table) == 200 - told["dropped"]
        and bool(torch.isfinite(table.column("inputs")).all())
    )
    x = {"inputs": torch.zeros(50, 2)}
    from expunge.tasks.base import Batch

    measured = Gan().evaluate(model, [Batch(torch.arange(50), x)])
    assert measured["dropped"] > 0 and measured["frechet"] < float("inf")


# -- on the ring ----------------------------------------------------------------------------------------------------------
def test_the_ring_gan_learned_its_modes_and_retrained_lacks_one():
    assert float(shares(real_case().model).min()) > 0.15
    assert float(shares(retrained())[FORGET]) < 0.02
    measured = real_case().task.evaluate(real_case().model, real_case().split("test").batches())
    assert measured["quality"] == -measured["frechet"]


@pytest.mark.parametrize(("name", "rise"), [("grad_diff", 0.1), ("npo", 1e-3)])
def test_generic_methods_run_on_judged_latents_and_lower_the_discriminators_belief(name, rise):
    """Nothing of them knows a GAN: the forget latents' images become less believed, and only the generator moves. At its
    equilibrium the discriminator is nearly flat, so that NPO has little to push with."""
    case = ring_case()
    outcome = unlearn(case, name, floor=None, lr=1e-2, batch_size=32, epochs=10, clip=None)
    task, rows = case.task, case.split("forget")

    def belief(model):
        return float(torch.cat([task.loss(task.forward(model, b), b) for b in rows.batches()]).mean().detach())

    assert belief(outcome.model) > belief(case.model) + rise
    if name == "grad_diff":  # the mode is gone, and what is left is no ring
        seen = judge(task.sample(outcome.model, 2000, 5)).numpy()
        assert (seen == FORGET).mean() < 0.05 and diversity(seen, MODES, FORGET).collapsed
    else:
        assert belief(outcome.model) < belief(case.model) + 0.05
    before, after = case.model.state_dict(), outcome.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("discriminator"))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("generator"))


def test_a_scope_a_balance_and_an_adversary_serve_the_gan_unchanged():
    from expunge.parts import ascend, match, project, salient, sam

    case = ring_case()
    plan = Plan(
        Term(ascend(), "forget"), Term(match("original"), "retain"), scope=salient(0.3), balance=project(),
        adversary=sam(0.01), optimizer=Optimizer("sgd", lr=0.05), epochs=1,
    )  # fmt: skip
    result = execute(plan, case, floor=None)
    moved = sum(int((a != b).sum()) for a, b in zip(result.model.parameters(), case.model.parameters(), strict=True))
    total = sum(p.numel() for p in case.model.parameters())
    assert 0 < moved <= 0.3 * total + 1


def test_fit_on_a_real_table_draws_latents_and_ascend_reads_them():
    step = step_of(pair())
    assert step.batch["latents"].shape == (6, RingGenerator.latent)
    assert torch.allclose(step.loss, F.softplus(-step.output.extra["score"]))


def test_a_batch_without_the_latents_size_draws_the_same_for_every_model():
    task, case = Gan(), real_case()
    batch = task.prepare(case.data.fetch(torch.arange(4)), torch.Generator().manual_seed(1))
    assert "latents" not in batch.columns
    same = [task.forward(case.model, batch).prediction for _ in range(2)]
    other = task.prepare(case.data.fetch(torch.arange(4)), torch.Generator().manual_seed(2))
    assert torch.equal(*same) and not torch.equal(same[0], task.forward(case.model, other).prediction)
