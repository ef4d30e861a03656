"""The task of conditional variational autoencoders: its numbers against closed forms, what it draws, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from expunge import Case, TensorData, Vae, requests
from expunge.engine import Workbench
from expunge.errors import BadData, BadModel, BadSetting, UnmetNeed
from expunge.parts.objectives import relabel
from expunge.tasks.base import Batch
from tiny_vae import LATENT, TinyVae, images


def tiny(seed: int = 0) -> TinyVae:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyVae()


def case_of(model=None, rows: int = 40, **settings) -> Case:
    return Case(model or tiny(), images("train", rows), requests.label(3), task=Vae(**settings))


def ready(case: Case, rows: int = 6, seed: int = 1) -> Batch:
    bench = Workbench(case, case.model)
    return case.task.prepare(bench.fill(case.data.fetch(torch.arange(rows))), torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """x = W z + b_c + noise with orthogonal columns of W, and the exact posterior: its ELBO is the evidence."""

    def __init__(self, sigma: float):
        super().__init__()
        self.weight = nn.Parameter(
            torch.linalg.qr(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))[0] * 1.5
        )
        self.offset = nn.Parameter(torch.tensor([[0.0] * 5, [1.0] * 5]))
        self.sigma = sigma

    def encode(self, x, c):
        precision = 1 + 1.5**2 / self.sigma**2
        mean = (x - self.offset[c]) @ self.weight / self.sigma**2 / precision
        return mean, torch.full_like(mean, -math.log(precision))

    def decode(self, z, c):
        return z @ self.weight.T + self.offset[c]


def test_with_the_exact_posterior_the_mean_loss_is_minus_the_log_evidence():
    model, task, sigma = Linear(0.7), Vae(likelihood="gaussian", sigma=0.7), 0.7
    x, c = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1])
    many = 20_000
    batch = Batch(torch.arange(3 * many), {"inputs": x.repeat(many, 1), "labels": c.repeat(many)})
    batch = task.prepare(batch.with_columns(_latent=(2,)), torch.Generator().manual_seed(2))
    loss = task.loss(task.forward(model, batch), batch).view(many, 3).mean(0)
    spread = model.weight @ model.weight.T + sigma**2 * torch.eye(5)
    evidence = torch.stack(
        [MultivariateNormal(model.offset[k], spread).log_prob(row) for row, k in zip(x, c, strict=True)]
    )
    assert torch.allclose(-loss, evidence, atol=0.03)


def test_the_loss_is_cross_entropy_and_a_gaussian_divergence_summed_over_values():
    case = case_of(beta=0.5)
    batch, model, task = ready(case), case.model, case.task
    mean, log_variance = model.encode(batch["inputs"], batch["labels"])
    std = (log_variance / 2).exp()
    decoded = model.decode(mean + std * batch["noise"], batch["labels"])
    by_hand = -Bernoulli(decoded, validate_args=False).log_prob(batch["inputs"]).flatten(1).sum(1)
    divergence = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(1)
    output = task.forward(model, batch)
    assert torch.allclose(task.loss(output, batch), by_hand + 0.5 * divergence, rtol=1e-4)
    told = task.evaluate(model, [batch])
    assert told["rate"] == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert told["distortion"] == pytest.approx(by_hand.mean().item(), rel=1e-4) and told["elbo"] == -told["loss"]


def test_logits_and_probabilities_are_one_likelihood():
    a, b, x = Vae(), Vae(likelihood="logits"), torch.rand(4, 1, 8, 8)
    logits = torch.randn(4, 1, 8, 8)
    assert torch.allclose(a.surprise(logits.sigmoid(), x), b.surprise(logits, x), atol=1e-4)
    assert torch.allclose(b.images(logits), logits.sigmoid())


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_divergence_is_that_of_posteriors_and_decoders_and_zero_only_between_equals(likelihood):
    case = case_of(likelihood=likelihood, sigma=0.3 if likelihood == "gaussian" else 1.0)
    batch, task = ready(case), case.task
    mine, theirs = task.forward(case.model, batch), task.forward(tiny(5), batch)
    q, r = (Normal(o.extra["mean"], (o.extra["log_variance"] / 2).exp()) for o in (mine, theirs))
    of = (lambda p: Bernoulli(p)) if likelihood == "bernoulli" else (lambda p: Normal(p, 0.3))
    by_hand = kl_divergence(r, q).sum(1) + kl_divergence(of(theirs.prediction), of(mine.prediction)).flatten(1).sum(1)
    assert torch.allclose(task.divergence(mine, theirs, batch), by_hand, rtol=1e-3, atol=1e-3)
    assert torch.allclose(task.divergence(mine, mine, batch), torch.zeros(6), atol=1e-5) and bool(
        (by_hand > 0.01).all()
    )


def test_student_and_reference_see_one_noise_and_another_draw_is_another():
    case = case_of()
    batch = ready(case)
    assert batch["noise"].shape == (6, LATENT)
    same = [case.task.forward(tiny(), batch).prediction for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(ready(case, seed=2)["noise"], batch["noise"])
    bare = case.data.fetch(torch.arange(6))  # nobody has said the size: the seed of the draw stands for it
    drawn = case.task.prepare(bare, torch.Generator().manual_seed(1))
    assert torch.equal(*(case.task.forward(tiny(), drawn).prediction for _ in range(2)))


def test_another_answer_is_an_image_of_another_class_or_noise_in_the_images_range():
    case = case_of()
    batch, task = ready(case, rows=20), case.task
    new = task.relabel(batch, torch.Generator().manual_seed(0), "other")
    table, classes = case.data.column("inputs"), case.data.column("labels")
    shown = [int(classes[(table == image).flatten(1).all(1).nonzero()[0, 0]]) for image in new["inputs"]]
    assert torch.equal(new["labels"], batch["labels"])
    assert all(a != b for a, b in zip(shown, batch["labels"].tolist(), strict=True))
    noise = task.relabel(batch, torch.Generator().manual_seed(0), "noise")["inputs"]
    assert 0 <= float(noise.min()) < 0.05 and 0.95 < float(noise.max()) <= 1 and abs(float(noise.mean()) - 0.5) < 0.05
    wide = case_of(likelihood="gaussian")
    wide = wide.with_(data=TensorData(inputs=4 * table - 3, labels=classes))
    noise = task.relabel(ready(wide, rows=20), torch.Generator().manual_seed(0), "noise")["inputs"]
    assert -3 <= float(noise.min()) < -2.8 and 0.8 < float(noise.max()) <= 1
    with pytest.raises(BadSetting, match="other, noise"):
        task.relabel(batch, torch.Generator(), "uniform")


def test_answers_that_are_drawn_once_are_the_images_not_the_classes():
    """Labels are what a classifier answers; drawn once, they used to be kept for generative kinds too, which changed nothing."""
    case = case_of()
    bench, objective = Workbench(case, case.model), relabel("other", draw="once")
    memory = objective.prepare(bench, "forget")
    ids = bench.splits["forget"].ids
    assert memory[ids].shape == (len(ids), 1, 8, 8)
    batch = case.task.prepare(bench.fill(case.data.fetch(ids)), torch.Generator().manual_seed(0))
    step = bench.step(batch, "forget", objective)
    step.scratch["memory"] = memory
    by_hand = case.task.loss(case.task.forward(case.model, other := batch.with_columns(inputs=memory[ids])), other)
    assert torch.equal(objective(step), by_hand) and not torch.equal(by_hand, bench.step(batch).loss)


def test_samples_are_decoded_standard_normals_equal_for_equal_seeds_whatever_the_batch():
    model, task, labels = tiny(), Vae(), torch.arange(10)
    made = task.sample(model, labels, seed=4)
    assert made.shape == (10, 1, 8, 8) and torch.equal(made, task.sample(model, labels, seed=4))
    assert torch.allclose(made, task.sample(model, labels, seed=4, batch_size=3), atol=1e-6)
    assert not torch.equal(made, task.sample(model, labels, seed=5))
    many = task.sample(Echo(), torch.zeros(4000, dtype=torch.long), seed=0)
    assert abs(float(many.mean())) < 0.05 and abs(float(many.std()) - 1) < 0.05


class Echo(nn.Module):
    latent_dim = 3

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def encode(self, x, c):
        return x, x

    def decode(self, z, c):
        return z


class Broken(TinyVae):
    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def encode(self, x, c):
        found = super().encode(x, c)
        return found[0] if self.how == "one value" else found

    def decode(self, z, c):
        made = super().decode(z, c)
        return made.flatten(1) if self.how == "flat" else made * 20 - 5 if self.how == "no probability" else made


@pytest.mark.parametrize(
    ("model", "changes", "told"),
    [
        (nn.Linear(64, 10), {}, "expected the model to have encode"),
        (Broken("one value"), {}, "mean, log variance"),
        (Broken("flat"), {}, "expected decode to return images of shape"),
        (Broken("no probability"), {}, "likelihood='logits'"),
        (TinyVae(), {"inputs": images("train", 20)[0] * 2 - 1}, "expected images in \\[0, 1\\]"),
        (TinyVae(), {"labels": F.one_hot(images("train", 20)[1], 10)}, "labels as class ids"),
        (TinyVae(), {"labels": images("train", 20)[1] + 9}, "labels are class ids"),
    ],
)
def test_what_does_not_fit_is_said_before_any_compute(model, changes, told):
    x, y = images("train", 20)
    with pytest.raises((BadModel, BadData), match=told):
        Case(model, TensorData(**{"inputs": x, "labels": y, **changes}), requests.samples([0]), task="vae")


def test_settings_and_sizes_that_nobody_said():
    for wrong in ({"likelihood": "poisson"}, {"sigma": 0.0}, {"beta": -1.0}):
        with pytest.raises(BadSetting):
            Vae(**wrong)

    class Silent(TinyVae):
        latent = None

    with pytest.raises(UnmetNeed, match="latent=..."):
        Vae().sample(Silent(), torch.zeros(2, dtype=torch.long))
    assert Vae(latent=LATENT).sample(Silent(), torch.zeros(2, dtype=torch.long)).shape == (2, 1, 8, 8)
