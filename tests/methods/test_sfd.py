"""SFD: the generator, its two losses and what they must not read, against the card's equations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from expunge import Optimizer, TensorData, load_model, unlearn
from expunge.engine.optimizer import MaskedOptimizer
from expunge.engine.workbench import Workbench
from expunge.errors import BadModel
from expunge.methods import find
from expunge.parts.guarded import load_saved
from expunge.parts.objectives.scores import FakeScore, score_distance, score_loss
from expunge.tasks.denoiser import Denoiser
from expunge.tasks.one_step import OneStep, timestep_of, timesteps_of
from expunge.tasks.sampling import Sampling, sample
from tiny_pipelines import class_case, text_case, tiny_class, tiny_text

FAST = {"steps": 3, "batch_size": 16, "lr": 1e-3, "fake_lr": 1e-3, "decay": 0.5}


def test_the_start_is_at_sigma_2_50_on_both_published_schedules_and_the_times_are_theirs():
    linear, scaled = tiny_class(), tiny_text()
    assert abs(timestep_of(linear, 2.5) - 440) <= 1 and abs(timestep_of(scaled, 2.5) - 625) <= 1
    for model, start in ((linear, 440), (scaled, 625)):
        a, b = model.levels(torch.tensor([start]), torch.zeros(1, 1, 1, 1))
        assert float(b / a) == pytest.approx(2.50, abs=0.01)
    for model, times in ((linear, (38, 711)), (scaled, (20, 979))):
        assert all(abs(x - y) <= 2 for x, y in zip(timesteps_of(model, (0.137, 13.1)), times, strict=True))
    flow = tiny_class(flow=True)
    assert timestep_of(flow, 2.5) == round(1000 * 2.5 / 3.5)  # b / a = s / (1 - s)


@pytest.mark.parametrize("settings", [{}, {"prediction": "v_prediction"}, {"prediction": "sample"}, {"flow": True}])
def test_at_first_the_generator_is_the_teachers_clean_prediction_of_pure_noise(settings):
    model = tiny_class(**settings)
    start = timestep_of(model, 2.5)
    made = OneStep.around(model, start)
    z, c, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), torch.full((4,), start)
    a, b = model.levels(t, z)
    output = model(b * z, t, model.encode(c))
    assert torch.allclose(made.draw(z, made.encode(c)), model.to_clean(b * z, t, output))
    if not settings:  # epsilon: u / a - (b / a) eps, without a signal term
        assert torch.allclose(made.draw(z, made.encode(c)), b * z / a - b / a * output, rtol=1e-4, atol=1e-4)


def test_one_call_per_image_and_no_guidance():
    made = OneStep.around(tiny_class(), 440)
    calls = []
    made.unet.register_forward_hook(lambda *_: calls.append(1))
    sample(made, torch.tensor([1, 2, 3]), Sampling(25, guidance=4.0), seeds=[0, 1, 2])
    assert len(calls) == 1


# -- the losses --------------------------------------------------------------------------------------------------------
def test_the_loss_by_hand_and_its_form_at_alpha_1():
    rng = torch.Generator().manual_seed(0)
    x, phi, psi = (torch.randn(3, 1, 4, 4, generator=rng) for _ in range(3))
    for alpha in (1.0, 1.2):
        for i, value in enumerate(score_loss(x, phi, psi, alpha)):
            omega = float((phi[i] - x[i]).abs().mean())
            gap = phi[i] - psi[i]
            assert float(value) == pytest.approx(float((gap * ((phi[i] - x[i]) - alpha * gap)).sum()) / omega, rel=1e-5)
    special = ((phi - psi) * (psi - x)).flatten(1).sum(1) / (phi - x).abs().flatten(1).mean(1)
    assert torch.allclose(score_loss(x, phi, psi, 1.0), special, rtol=1e-4)
    assert torch.isfinite(score_loss(x, x, psi, 1.2)).all()  # omega is clamped
    x.requires_grad_(True)
    (g,) = torch.autograd.grad(score_loss(x, phi, psi, 1.2).sum(), x)
    omega = (phi - x).detach().abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    assert torch.allclose(g, -(phi - psi) / omega)  # omega is a number: nothing comes through it


@pytest.fixture
def bench():
    case = class_case(tiny_class())
    generator = OneStep.around(copy.deepcopy(case.model), 440)
    bench = Workbench(case, generator)
    bench.networks["fake_score"] = copy.deepcopy(case.model)
    return bench


def step_of(bench, objective, model=None):
    batch = bench.fill(bench.splits["forget"].data.fetch(bench.splits["forget"].ids))
    step = bench.step(bench.task.prepare(batch, torch.Generator().manual_seed(1)), "forget", objective)
    step.model = model or step.model
    return step


def test_equal_scores_and_equal_conditions_give_exactly_nothing(bench):
    value = score_distance()
    assert bool((value(step_of(bench, value)) == 0).all())
    other = score_distance("next")
    assert bool((other(step_of(bench, other)) != 0).all())  # the teacher is asked another class


def test_gradients_reach_the_generator_through_both_scores_and_neither_scores_weights(bench):
    with torch.no_grad():
        for p in bench.networks["fake_score"].unet.conv_out.parameters():
            p += 0.1
    bench.networks["fake_score"].requires_grad_(False)
    value = score_distance("next")
    step = step_of(bench, value)
    parameters = [p for p in bench.model.unet.parameters()]
    full = torch.cat([g.flatten() for g in torch.autograd.grad(value(step).sum(), parameters, retain_graph=True)])
    assert bool(full.any())
    assert all(p.grad is None and not p.requires_grad for p in step.references.model("original").parameters())

    class Held(type(value)):
        def said(self, *arguments):
            with torch.no_grad():
                return super().said(*arguments)

    held = Held(rule="next")
    cut = torch.cat([g.flatten() for g in torch.autograd.grad(held(step_of(bench, held)).sum(), parameters)])
    assert not torch.allclose(full, cut, rtol=0.05)  # a no_grad around the score calls is the classic fault


def test_the_fake_score_learns_what_the_generator_draws_and_the_generator_learns_nothing_from_it(bench):
    value, fake = FakeScore(), bench.networks["fake_score"]
    step = step_of(bench, value, fake)
    total = value(step).mean()
    total.backward()
    assert all(p.grad is None for p in bench.model.parameters()) and fake.unet.conv_in.weight.grad.any()
    # by hand, with the same draws: sum over values of the noise's squared error at x_t of the drawn images
    rng = step_of(bench, value, fake).rng
    z = torch.randn(len(step.batch), 1, 8, 8, generator=rng)
    x = bench.model.draw(z, step.batch["labels"]).detach()
    low, high = timesteps_of(bench.model, (0.137, 13.1))
    t = torch.randint(low, high + 1, (len(x),), generator=rng)
    e = torch.randn(x.shape, generator=rng)
    kept = bench.model.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    said = fake.unet(kept.sqrt() * x + (1 - kept).sqrt() * e, t, class_labels=step.batch["labels"]).sample
    assert torch.allclose(total, (said - e).square().flatten(1).sum(1).mean(), rtol=1e-4)


@pytest.mark.parametrize("where", ["model", "original", "fake_score"])
def test_a_sample_that_is_not_finite_is_dropped_with_its_gradient_and_counted(where, bench):
    """One class's embedding is NaN in one of the three networks: its rows count 0, and the others' mean over the whole batch is by hand."""
    value = score_distance()
    rows = bench.case.split("train")
    batch = bench.task.prepare(bench.fill(rows.data.fetch(rows.ids[:12])), torch.Generator().manual_seed(1))
    gone = batch["labels"] == batch["labels"][0]
    assert 0 < int(gone.sum()) < 12
    with torch.no_grad():
        for p in bench.networks["fake_score"].unet.conv_out.parameters():
            p += 0.1
    teacher = bench.references.model("original")
    networks = {"model": bench.model, "original": teacher, "fake_score": bench.networks["fake_score"]}
    parameters = [p for n, p in bench.model.unet.named_parameters() if "class_embedding" not in n]

    def step():
        made = bench.step(batch, "train", value)
        made.scratch["memory"] = value.prepare(bench, "train")
        return made

    z, t, e = value.draws(step())
    z, t, e, labels = z[~gone], t[~gone], e[~gone], batch["labels"][~gone]
    x = bench.model.draw(z, bench.model.encode(labels))
    noisy = bench.model.noised(x, e, t)
    f_phi, f_psi = (
        networks[n].to_clean(noisy, t, networks[n](noisy, t, networks[n].encode(labels)))
        for n in ("original", "fake_score")
    )
    wanted = torch.autograd.grad(score_loss(x, f_phi, f_psi, 1.2).sum() / 12, parameters)

    kept = networks[where].unet.class_embedding.weight.detach().clone()
    with torch.no_grad():
        networks[where].unet.class_embedding.weight[batch["labels"][0]] = float("nan")
    losses = value(step())
    assert bool((losses[gone] == 0).all()) and bool((losses[~gone] != 0).all())
    found = torch.autograd.grad(losses.mean(), parameters)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found, wanted, strict=True))
    assert bench.notes["dropped"] == {f"{value} [train]": int(gone.sum())}
    if where == "model":  # the fake score learns from the others alone
        fake = FakeScore()
        asked = bench.step(batch, "train", fake)
        asked.model = bench.networks["fake_score"]
        errors = fake(asked)
        assert bool((errors[gone] == 0).all()) and bool((errors[~gone] > 0).all())
    with torch.no_grad():
        networks[where].unet.class_embedding.weight[:] = float("nan")
    assert bool(value(step()).isnan().all())  # nothing is left: the loop ends the run at its last good state
    with torch.no_grad():
        networks[where].unet.class_embedding.weight.copy_(kept)


# -- the method --------------------------------------------------------------------------------------------------------
def test_no_image_is_read():
    case = class_case()
    other = case.with_(data=TensorData(latents=-case.data.column("latents"), labels=case.data.column("labels")))
    a, b = (unlearn(c, "sfd", floor=None, **FAST).model.state_dict() for c in (case, other))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_terms_and_players_are_the_papers_and_without_g_f_only_the_distillation_is_left():
    case = class_case()
    plan = find("sfd").configure().action(case)
    assert [(t.on, t.weight) for t in plan.terms] == [("retain", 1.0), ("forget", 0.01)]
    assert [(t.on, t.weight) for t in plan.adversary.terms] == [("retain", 1.0), ("forget", 0.01)]
    assert (plan.terms[0].objective.rule, plan.terms[1].objective.rule, plan.terms[1].objective.alpha) == (
        None,
        "next",
        1.2,
    )
    for move in (plan.optimizer, plan.adversary.optimizer):
        assert (move.betas, move.clip_value, move.clip) == ((0.0, 0.999), 1.0, None)
    none = find("sfd").configure(g_f=0.0, w_f=0.0).action(case)
    assert [t.on for t in (*none.terms, *none.adversary.terms)] == ["retain", "retain"]
    first, last = find("sfd").configure(distil_steps=10).action(case).phases
    assert [t.on for t in (*first.terms, *first.adversary.terms)] == ["train", "train"] and last.terms[1].on == "forget"


def test_two_stages_run_as_many_steps_as_they_say_and_the_fake_score_goes_on():
    outcome = unlearn(class_case(), "sfd", floor=None, distil_steps=2, **FAST)
    assert [h["phase"] for h in outcome.record["history"]] == [0, 0, 1, 1, 1]
    assert isinstance(outcome.model, OneStep) and outcome.record["updates"] == 5


def test_the_floor_on_a_denoisers_utility_is_off_for_a_generator():
    outcome = unlearn(class_case(), "sfd", **FAST)  # an epoch ends within these steps, where the floor is looked at
    assert not outcome.record["restored"] and "off" in outcome.record["notes"]["floor"]
    assert not torch.equal(outcome.model.unet.conv_in.weight, class_case().model.unet.conv_in.weight)


def test_a_run_counts_what_it_dropped(monkeypatch):
    honest = OneStep.draw

    def broken(self, noise, encoded):
        drawn = honest(self, noise, encoded).clone()
        if len(noise) == FAST["batch_size"]:
            drawn[0] = float("nan")
        return drawn

    clean = unlearn(class_case(), "sfd", floor=None, **FAST).record
    assert clean["notes"]["dropped"] == {}
    monkeypatch.setattr(OneStep, "draw", broken)
    outcome = unlearn(class_case(), "sfd", floor=None, **FAST)
    dropped = outcome.record["notes"]["dropped"]
    assert dropped["error on G(z) [retain]"] > 0 and any(name.startswith("score(") for name in dropped)
    assert outcome.record["ended"] == clean["ended"] and not outcome.record["restored"]
    assert all(bool(v.isfinite().all()) for v in outcome.model.state_dict().values())


def test_gradients_are_cut_by_value():
    net = nn.Linear(2, 1, bias=False)
    optimizer = MaskedOptimizer(net, Optimizer("sgd", lr=1.0, clip_value=1.0), {"weight": True}, 1, 1)
    before = net.weight.detach().clone()
    net.weight.grad = torch.tensor([[3.0, 0.5]])
    optimizer.step()
    assert torch.allclose(before - net.weight.detach(), torch.tensor([[1.0, 0.5]]))  # by norm it were (0.99, 0.16)


def test_the_generator_goes_to_disk_as_a_pipeline_and_comes_back_as_a_generator(tmp_path):
    from diffusers import DiffusionPipeline

    case = text_case()
    outcome = unlearn(case, "sfd", to="red -> plain", floor=None, run=tmp_path / "run", **FAST)
    folder = tmp_path / "run" / "model"
    loaded = load_model(folder)
    conditions = case.model.conditions.of(["a plain three", "a red four"])
    wanted = sample(outcome.model, conditions, seeds=[1, 2]).images
    assert isinstance(loaded, OneStep) and torch.equal(sample(loaded, conditions, seeds=[1, 2]).images, wanted)
    again = load_saved(folder, copy.deepcopy(case.model))
    assert isinstance(again, OneStep) and torch.equal(sample(again, conditions, seeds=[1, 2]).images, wanted)
    rerun = unlearn(case, "sfd", to="red -> plain", floor=None, run=tmp_path / "run", **FAST)  # read back
    assert torch.equal(sample(rerun.model, conditions, seeds=[1, 2]).images, wanted)
    assert type(Denoiser(DiffusionPipeline.from_pretrained(folder, local_files_only=True))) is Denoiser
    (folder / "one_step.json").write_text("{}")
    with pytest.raises(BadModel, match=r"one_step\.json"):
        load_model(folder)
