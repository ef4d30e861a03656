"""Every part alone, against hand-computed numbers or the slow obvious way."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge import Case, Optimizer, Plan, Term, Training, requests
from expunge.engine import Workbench, run_plan
from expunge.errors import BadSetting, ConstantTerm, Diverged, EmptyScope
from expunge.parts import (
    Decay,
    Multiplier,
    Until,
    aggregate,
    anchor,
    ascend,
    average,
    curvature,
    fisher_ratio,
    fit,
    forget_reaches_holdout,
    gradient_penalty,
    l1,
    largest,
    last_layers,
    layers,
    leave,
    low_rank,
    match,
    match_features,
    npo,
    pgd,
    project,
    random_weights,
    relabel,
    salient,
    sam,
    smooth,
    steps,
    utility_floor,
)
from expunge.parts.objectives import attention, npo_loss
from expunge.parts.scopes import top_share
from expunge.parts.step import Step
from expunge.tasks import Batch, Classification, Output, Regression


def small_case(seed: int = 0, n: int = 48, forget: int = 12, **kwargs) -> Case:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 5, generator=g), torch.randint(0, 3, (n,), generator=g)
    xt, yt = torch.randn(30, 5, generator=g), torch.randint(0, 3, (30,), generator=g)
    torch.manual_seed(seed)
    build = lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))  # noqa: E731
    settings = {"recipe": Training(epochs=2), "build": build} | kwargs
    return Case(build(), (x, y), requests.samples(range(forget)), test=(xt, yt), **settings)


def run(case: Case, plan: Plan, seed: int = 0):
    bench = Workbench(case, copy.deepcopy(case.model), seed)
    trace = run_plan(plan, bench)
    return bench, trace


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def full_gradient(case: Case, split: str, sign: float = 1.0, model: nn.Module | None = None) -> torch.Tensor:
    model = copy.deepcopy(model or case.model)
    rows = case.split(split)
    batch = rows.data.fetch(rows.ids)
    loss = sign * F.cross_entropy(model(batch["inputs"]), batch["labels"])
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


def one_step(case: Case, *terms: Term, lr: float = 0.1, **settings) -> torch.Tensor:
    """The update direction (theta_0 - theta_1) / lr of one full-batch step."""
    plan = Plan(*terms, optimizer=Optimizer("sgd", lr=lr), epochs=1, batch_size=10_000, **settings)
    bench, _ = run(case, plan)
    return (flat(case.model) - flat(bench.model)) / lr


# -- objectives --------------------------------------------------------------------------------------------------------
def test_sum_of_terms_is_the_sum_of_gradients():
    case = small_case()
    step = one_step(case, Term(ascend(), "forget", 0.3), Term(fit(), "retain", 0.7))
    expected = 0.3 * full_gradient(case, "forget", -1.0) + 0.7 * full_gradient(case, "retain")
    assert torch.allclose(step, expected, atol=2e-6)


def test_ascent_cap_has_no_gradient_above_the_cap():
    case = small_case()
    assert torch.count_nonzero(one_step(case, Term(ascend(cap=1e-6)))) == 0
    assert torch.count_nonzero(one_step(case, Term(ascend(cap=1e6)))) > 0


def test_npo_gradient_tends_to_ascents_as_beta_falls():
    case = small_case()
    moved = case.with_(model=copy.deepcopy(case.model))
    with torch.no_grad():
        for p in moved.model.parameters():
            p.add_(0.1)
    ascent = full_gradient(moved, "forget", -1.0)
    errors = []
    for beta in (1.0, 0.1, 0.01):
        bench = Workbench(case, copy.deepcopy(moved.model))
        g = bench.gradient("forget", npo(beta), reduction="mean")
        errors.append(float((torch.cat([v.reshape(-1) for v in g.values()]) - ascent).norm() / ascent.norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


def test_npo_by_hand():
    value = npo_loss(torch.tensor([-1.0]), torch.tensor([-0.5]), beta=2.0)
    # -(2/2) log sigmoid(-2 * (-1 + 0.5)) = -log sigmoid(1)
    assert float(value) == pytest.approx(math.log1p(math.exp(-1.0)), abs=1e-6)


def test_npo_at_the_reference_is_ascent_exactly():
    case = small_case()
    assert torch.allclose(one_step(case, Term(npo(0.7))), full_gradient(case, "forget", -1.0), atol=2e-6)


def test_match_is_kl_from_the_reference_times_t_squared():
    logits, target = torch.randn(4, 3), torch.randn(4, 3)
    batch = Batch(torch.arange(4), {"labels": torch.zeros(4, dtype=torch.int64)})
    ours = Classification().divergence(Output(logits), Output(target), batch, temperature=2.0)
    slow = F.kl_div(F.log_softmax(logits / 2, -1), F.softmax(target / 2, -1), reduction="none").sum(-1)
    assert torch.allclose(ours, slow, atol=1e-6)
    case = small_case()
    assert torch.count_nonzero(one_step(case, Term(match()), lr=1.0).abs() > 1e-6) == 0  # at the reference itself
    away = one_step(case, Term(leave("random", temperature=2.0)))
    near = one_step(case, Term(match("random", temperature=2.0)))
    assert torch.allclose(away, -near, atol=1e-6) and near.norm() > 0


def test_feature_match_is_zero_at_the_reference_and_normalised():
    a = torch.randn(6, 4, 3, 3)
    maps = attention(a)
    assert torch.allclose(maps.norm(dim=1), torch.ones(6), atol=1e-5)
    assert torch.allclose(maps[0], F.normalize(a[0].square().mean(0).reshape(1, -1), dim=1)[0], atol=1e-6)
    case = small_case()
    assert one_step(case, Term(match_features(["1"]))).abs().max() < 1e-6
    assert one_step(case, Term(match_features(["1"], reference="random"))).abs().max() > 1e-5


def test_relabel_never_gives_the_true_label_and_uniform_sometimes_does():
    batch = Batch(torch.arange(500), {"labels": torch.arange(500) % 10, "_classes": 10})
    rng = torch.Generator().manual_seed(0)
    other = Classification().relabel(batch, rng, "other")["labels"]
    uniform = Classification().relabel(batch, rng, "uniform")["labels"]
    assert (other != batch["labels"]).all() and other.unique().numel() == 10
    assert 0.05 < float((uniform == batch["labels"]).float().mean()) < 0.16
    with pytest.raises(BadSetting, match="relabel policy"):
        Classification().relabel(batch, rng, "nonsense")


def test_relabel_once_keeps_its_answers_over_epochs():
    case = small_case()
    bench = Workbench(case, copy.deepcopy(case.model), 5)
    objective = relabel(draw="once")
    table = objective.prepare(bench, "forget")
    again = objective.prepare(bench, "forget")
    assert torch.equal(table, again)
    rows = case.split("forget").ids
    assert (table[rows] != case.data.column("labels")[rows]).all()


def test_regression_relabel_draws_from_the_marginal_of_all_targets():
    y = torch.randn(4000) * 3 + 7
    batch = Batch(torch.arange(4000), {"labels": y, "_target_mean": y.mean(), "_target_std": y.std()})
    new = Regression().relabel(batch, torch.Generator().manual_seed(0))["labels"]
    assert abs(float(new.mean()) - 7) < 0.3 and abs(float(new.std()) - 3) < 0.2
    assert abs(float(torch.corrcoef(torch.stack([new, y]))[0, 1])) < 0.06


def test_l1_is_the_sum_over_all_parameters():
    case = small_case()
    step = one_step(case, Term(l1(), "retain", 0.5))
    assert torch.allclose(step, 0.5 * flat(case.model).sign(), atol=1e-5)


def test_anchor_pulls_back_to_the_reference():
    case = small_case()
    start = copy.deepcopy(case.model)
    with torch.no_grad():
        for p in start.parameters():
            p.add_(0.2)
    bench = Workbench(case, start)
    g = bench.gradient("retain", anchor(power=2), reduction="mean")
    assert torch.allclose(torch.cat([v.reshape(-1) for v in g.values()]), torch.full_like(flat(start), 0.4), atol=1e-5)


# -- schedules ---------------------------------------------------------------------------------------------------------
def test_decay_is_the_l1_sparse_schedule():
    assert [Decay(1.0).at(e, 4) for e in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [Decay(1.0, rest=2).at(e, 4) for e in range(4)] == [1.0, 0.5, 0.0, 0.0]
    assert Decay(1.0, rest=4).at(2, 4) == 1.0  # the official code's constant when no epoch is left to decay in


def test_until_switches_a_term_off():
    case = small_case()
    _, trace = run(case, Plan(Term(ascend(), "forget", Until(2)), Term(fit(), "retain"), epochs=4, rhythm="in_turn"))
    seen = [{label for label in h["losses"]} for h in trace.history]
    assert any("-loss[forget]" in s for s, h in zip(seen, trace.history, strict=True) if h["epoch"] <= 2)
    assert not any("-loss[forget]" in s for s, h in zip(seen, trace.history, strict=True) if h["epoch"] > 2)


def test_multiplier_rises_while_the_constraint_is_broken_and_falls_to_zero_after():
    rule = Multiplier(bound=1.0, start=0.5, rate=2.0)
    assert rule.next(0.5, 1.5) == pytest.approx(1.5) and rule.next(0.5, 0.5) == 0.0
    case = small_case()
    plan = Plan(
        Term(ascend(), "forget"), Term(fit(), "retain", Multiplier(bound=0.0, rate=0.1)), epochs=3,
        optimizer=Optimizer("sgd", lr=0.05),
    )  # fmt: skip
    _, trace = run(case, plan)
    values = [h["multipliers"]["1"] for h in trace.history]
    assert values == sorted(values) and values[0] > 0


# -- scopes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("density", [0.0, 0.1, 0.37, 0.5, 1.0])
def test_top_share_is_exact_and_global(density):
    scores = {"a": torch.rand(7, 5), "b": torch.zeros(9), "c": torch.rand(3) + 2}
    masks = top_share(scores, density)
    chosen = sum(int(m.sum()) for m in masks.values())
    assert chosen == int(density * 47)
    if 0 < density < 1:
        ranked = torch.cat([s.reshape(-1) for s in scores.values()]).sort(descending=True).values
        least = torch.cat([scores[k][masks[k]] for k in scores]).min()
        assert least >= ranked[chosen]


def test_saliency_is_abs_of_the_sum_not_sum_of_abs():
    case = small_case()
    bench = Workbench(case, copy.deepcopy(case.model))
    from expunge.parts.scopes.base import Saliency

    score = Saliency(batch_size=4)(bench)
    rows = case.split("forget")
    total = 0
    for batch in rows.batches(4):
        model = copy.deepcopy(case.model).eval()
        loss = F.cross_entropy(model(batch["inputs"]), batch["labels"])
        total = total + torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert torch.allclose(torch.cat([s.reshape(-1) for s in score.values()]), total.abs(), atol=1e-6)


SCOPES = [salient(0.3), random_weights(0.5), largest(0.2), layers("2.*"), last_layers(1), fisher_ratio(0.2)]


@pytest.mark.parametrize("optimizer", [
    Optimizer("sgd", lr=0.1, momentum=0.9, weight_decay=0.1), Optimizer("adam", lr=0.01, weight_decay=0.1),
    Optimizer("adamw", lr=0.01, weight_decay=0.5),
])  # fmt: skip
@pytest.mark.parametrize("scope", SCOPES)
def test_weights_outside_the_scope_stay_bit_for_bit(scope, optimizer):
    case = small_case()
    bench, _ = run(case, Plan(Term(fit(), "retain"), scope=scope, optimizer=optimizer, epochs=3, batch_size=8))
    mask = scope.select(Workbench(case, copy.deepcopy(case.model), 0))
    moved = 0
    for name, before in case.model.named_parameters():
        after, m = dict(bench.model.named_parameters())[name], mask[name]
        live = m if isinstance(m, torch.Tensor) else torch.full_like(before, m, dtype=torch.bool)
        assert torch.equal(before[~live], after[~live])
        moved += int((before[live] != after[live]).sum())
    assert moved > 0


def test_scope_algebra():
    case = small_case()
    bench = Workbench(case, case.model)
    a, b = salient(0.5).select(bench), layers("0.*").select(bench)
    both = (salient(0.5) & layers("0.*")).select(bench)
    assert torch.equal(both["0.weight"], a["0.weight"]) and both["2.weight"] is False and b["0.weight"] is True
    inverse = (~salient(0.5)).select(bench)
    assert torch.equal(inverse["0.weight"], ~a["0.weight"])


def test_unmatched_layer_pattern_names_what_there_is():
    with pytest.raises(BadSetting, match=r"0\.weight"):
        layers("fc.*").select(Workbench(small_case(), small_case().model))


def test_empty_scope_is_a_warning_and_changes_nothing():
    case = small_case()
    with pytest.warns(EmptyScope):
        bench, _ = run(case, Plan(Term(fit(), "retain"), scope=salient(0.0)))
    assert torch.equal(flat(bench.model), flat(case.model))


def test_low_rank_comes_back_with_the_same_class_keys_and_a_low_rank_change():
    pytest.importorskip("peft")
    case = small_case()
    bench, _ = run(case, Plan(Term(fit(), "retain"), scope=low_rank(1), optimizer=Optimizer("adam", lr=0.05), epochs=3))
    assert type(bench.model) is type(case.model)
    assert bench.model.state_dict().keys() == case.model.state_dict().keys()
    for before, after in zip(case.model.parameters(), bench.model.parameters(), strict=True):
        assert after.requires_grad == before.requires_grad
        change = (after - before).detach()
        if change.dim() == 2:
            singular = torch.linalg.svdvals(change)
            assert singular[0] > 1e-4 and singular[1] < 1e-5 * singular[0] + 1e-6
        else:
            assert torch.count_nonzero(change) == 0


# -- balances ----------------------------------------------------------------------------------------------------------
def test_projection_never_moves_against_the_protected_gradient():
    guard = torch.tensor([1.0, 0.0, 0.0])
    for move in (torch.tensor([-2.0, 1.0, 0.0]), torch.tensor([2.0, 1.0, 0.0])):
        result = project().combine(torch.stack([move, guard]), ["forget", "retain"])
        expected = (move + torch.tensor([2.0, 0, 0]) if move[0] < 0 else move) + guard
        assert torch.allclose(result, expected)
        assert torch.dot(result, guard) >= 0


def test_a_balance_of_sums_equals_no_balance():
    from expunge.parts.balances import Sum

    case = small_case()
    terms = (Term(ascend(), "forget", 0.3), Term(fit(), "retain"))
    assert torch.allclose(one_step(case, *terms, balance=Sum()), one_step(case, *terms), atol=2e-6)


def test_upgrad_conflicts_with_no_term():
    pytest.importorskip("torchjd")
    case = small_case()
    step = one_step(case, Term(ascend(), "forget"), Term(fit(), "retain"), balance=aggregate("UPGrad"))
    assert torch.dot(step, full_gradient(case, "forget", -1.0)) >= -1e-6
    assert torch.dot(step, full_gradient(case, "retain")) >= -1e-6
    with pytest.raises(BadSetting, match="Did you mean 'UPGrad'"):
        aggregate("UpGrad").combine(torch.eye(2), ["forget", "retain"])


# -- adversaries -------------------------------------------------------------------------------------------------------
def quadratic(p: torch.Tensor):
    """l = 0.5 x' A x with its gradient A x: every smoother has a closed form here."""
    a = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=p.dtype))
    return a, lambda: [a @ p]


def test_smoothers_on_a_quadratic():
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    a, take = quadratic(x)
    g = a @ x
    ghat = g / g.norm()
    rng = torch.Generator().manual_seed(0)
    assert torch.allclose(sam(0.1).gradient(take, [x], rng)[0], a @ (x + 0.1 * ghat))
    assert torch.allclose(
        gradient_penalty(0.2, 0.01).gradient(take, [x], rng)[0], g + 0.2 * (a @ ghat)
    )  # d||g||/dx = A ghat
    assert torch.allclose(gradient_penalty(0.1, 0.1).gradient(take, [x], rng)[0], sam(0.1).gradient(take, [x], rng)[0])
    # on a quadratic the gradient changes by the constant mu A ghat along the fixed direction: no curvature term
    assert torch.allclose(curvature(0.5).gradient(take, [x], rng)[0], g, atol=1e-9)
    mean = sum(smooth(0.1, draws=50).gradient(take, [x], rng)[0] for _ in range(40)) / 40
    assert torch.allclose(mean, g, atol=0.02)
    assert torch.equal(x, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))  # restored to the same bits


def test_curvature_matches_autograd_on_a_quartic():
    x = torch.tensor([0.8, -0.4], dtype=torch.float64)
    take = lambda: [4 * x**3]  # noqa: E731
    lam, mu = 0.3, 0.05
    g0 = 4 * x**3
    ghat = g0 / g0.norm()
    y = x.clone().requires_grad_(True)
    penalty = (4 * (y + mu * ghat) ** 3 - 4 * y**3).norm()  # ghat fixed
    (expected,) = torch.autograd.grad(lam * penalty, y)
    got = curvature(lam, mu).gradient(take, [x], torch.Generator())[0]
    # mu ghat is also held fixed in the shifted evaluations
    assert torch.allclose(got, g0 + expected, rtol=2e-2, atol=1e-3)


def test_sam_hardens_only_its_split():
    case = small_case()
    step = one_step(case, Term(ascend(), "forget"), Term(fit(), "retain"), adversary=sam(0.05))
    g = full_gradient(case, "forget", -1.0)
    shifted = copy.deepcopy(case.model)
    start = 0
    with torch.no_grad():
        for p in shifted.parameters():
            p.add_((0.05 * g / g.norm())[start : start + p.numel()].view_as(p))
            start += p.numel()
    expected = full_gradient(case, "forget", -1.0, shifted) + full_gradient(case, "retain")
    assert torch.allclose(step, expected, atol=5e-6)


def test_input_attack_raises_the_loss_within_its_ball():
    case = small_case()
    bench = Workbench(case, copy.deepcopy(case.model))
    rows = case.split("forget")
    step = bench.step(bench.fill(rows.data.fetch(rows.ids)))
    attack = pgd(0.1, steps=4, low=None, high=None)
    batch = attack.inputs(step, lambda s: s.loss.mean())
    assert (batch["inputs"] - step.batch["inputs"]).abs().max() <= 0.1 + 1e-6
    assert case.task.loss(case.task.forward(case.model, batch), batch).mean() > step.loss.mean() + 0.01


def test_average_is_the_mean_of_the_iterates():
    case = small_case()
    settings = {"optimizer": Optimizer("sgd", lr=0.1), "batch_size": 12, "epochs": 1}
    iterates = []
    for k in (1, 2, 3):
        bench, _ = run(case, Plan(Term(fit(), "retain"), stop=steps(k), **settings))
        iterates.append(flat(bench.model))
    bench, _ = run(case, Plan(Term(fit(), "retain"), average=average(start=1), **settings))
    assert torch.allclose(flat(bench.model), torch.stack(iterates).mean(0), atol=1e-6)


# -- stops and warnings ------------------------------------------------------------------------------------------------
def test_steps_stop():
    _, trace = run(small_case(), Plan(Term(fit(), "retain"), epochs=50, stop=steps(7)))
    assert trace.updates == 7 and "7 steps" in trace.ended


def test_stop_when_forget_loss_reaches_holdouts():
    case = small_case()
    plan = Plan(Term(ascend()), epochs=200, optimizer=Optimizer("sgd", lr=0.05), stop=forget_reaches_holdout())
    bench, trace = run(case, plan)
    assert "reached holdout" in trace.ended
    assert bench.evaluate("forget")["loss"] >= bench.evaluate("holdout")["loss"]


def test_utility_floor_rolls_back_to_the_best_state():
    case = small_case()
    trained = run(case, Plan(Term(fit(), "train"), epochs=60, optimizer=Optimizer("adam", lr=0.02)))[0].model
    case = case.with_(model=trained)
    plan = Plan(Term(ascend(), "train"), epochs=60, optimizer=Optimizer("sgd", lr=0.3), stop=utility_floor(0.9))
    with pytest.warns(UserWarning, match="below the floor"):
        bench, trace = run(case, plan)
    assert trace.restored
    assert bench.evaluate("retain")["accuracy"] >= 0.9 * bench.evaluate("retain", case.model)["accuracy"]


def test_divergence_restores_the_last_good_state():
    case = small_case()
    plan = Plan(Term(ascend(), "forget"), epochs=400, optimizer=Optimizer("sgd", lr=3e38))
    with pytest.warns(Diverged):
        bench, trace = run(case, plan)
    assert trace.restored and torch.isfinite(flat(bench.model)).all()


def test_a_constant_term_is_a_warning():
    with pytest.warns(ConstantTerm):
        run(small_case(), Plan(Term(ascend(cap=1e-9), "forget"), epochs=5))


def test_formula_reads_like_one():
    plan = Plan(
        Term(npo(0.5)), Term(fit(), "retain", 2.0), scope=salient(0.5), adversary=sam(), balance=project(), epochs=3
    )
    assert str(plan) == (
        "min npo(β=0.5)[forget] + 2·loss[retain] over salient(0.5) balanced by project(retain) against sam(ρ=0.01) "
        "by sgd(lr=0.01) for 3 epochs"
    )


def test_a_step_makes_its_generator_when_something_draws() -> None:
    made: list[int] = []
    case = small_case()

    def maker() -> torch.Generator:
        made.append(1)
        return torch.Generator().manual_seed(3)

    batch = case.split("forget").data.fetch(torch.arange(4))
    step = Step(case.model, case.task, batch, None, maker)  # type: ignore[arg-type]
    assert step.loss.shape == (4,) and not made
    used = torch.Generator().manual_seed(3)
    torch.rand(2, generator=used)  # what a task's `prepare` drew before
    begun = Step(case.model, case.task, batch, None, used)  # type: ignore[arg-type]
    for one in (step, begun):
        first = torch.rand(5, generator=one.rng)
        assert torch.equal(torch.rand(5, generator=one.again().rng), first)  # the same draws, wherever this one is
        assert not torch.equal(torch.rand(5, generator=one.rng), first)
        one.rng = maker()  # another stream from here on
        assert torch.equal(torch.rand(5, generator=one.rng), torch.rand(5, generator=maker()))
