"""The loop: what each rhythm does, that references cost what they should, that a stopped run goes on to the same tensors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import expunge.parts.references
from expunge import Case, Optimizer, Plan, Regression, Term, Training, requests, unlearn
from expunge.engine import RunDirectory, Workbench, execute, fit, run_plan
from expunge.engine.checkpoint import Checkpointer
from expunge.engine.optimizer import MaskedOptimizer
from expunge.errors import BadSetting, UnmetNeed
from expunge.parts import (
    Auxiliary,
    Multiplier,
    ascend,
    average,
    leave,
    low_rank,
    match,
    match_features,
    npo,
    relabel,
    salient,
    sam,
    utility_floor,
)
from expunge.parts import fit as likelihood
from expunge.parts.objectives.density import align, contrast
from expunge.parts.objectives.wrapped import Clean
from expunge.tasks import Classification
from expunge.tasks.base import Batch

SGD = Optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=0.01)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def make_case(n: int = 40, forget: int = 11, **more) -> Case:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 5, generator=g), torch.randint(0, 3, (n,), generator=g)
    xt, yt = torch.randn(20, 5, generator=g), torch.randint(0, 3, (20,), generator=g)
    torch.manual_seed(0)
    return Case(
        build(), (x, y), requests.samples(range(forget)), test=(xt, yt), build=build, recipe=Training(epochs=3), **more
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_the_loop_equals_a_bare_pytorch_loop():
    case = make_case()
    model = copy.deepcopy(case.model)
    bench = Workbench(case, copy.deepcopy(case.model), 3)
    plan = Plan(Term(likelihood(), "retain"), optimizer=SGD, epochs=3, batch_size=8, mode="eval")
    seen: list[torch.Tensor] = []
    split = case.splits["retain"]
    original = type(split.data).fetch
    try:
        type(split.data).fetch = lambda self, ids: (seen.append(ids), original(self, ids))[1]
        run_plan(plan, bench)
    finally:
        type(split.data).fetch = original
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    rows = [ids for ids in seen if len(ids) > 1]
    assert len(rows) == 3 * 4 and sorted(torch.cat(rows[:4]).tolist()) == split.ids.tolist()
    for ids in rows:
        optimizer.zero_grad()
        F.cross_entropy(model(case.data.column("inputs")[ids]), case.data.column("labels")[ids]).backward()
        optimizer.step()
    assert same(model, bench.model)


def rows_per_update(plan: Plan, case: Case) -> list[dict[str, int]]:
    from expunge.engine.distribution import Distribution
    from expunge.engine.loop import Phase, Position, Trace

    phase = Phase(
        plan, 0, Workbench(case, copy.deepcopy(case.model)), Position(), Trace(), None, None, Distribution(), None
    )
    return [{k: len(v) for k, v in u.items()} for u in phase._updates(0)]


def test_rhythms():
    case = make_case()  # 11 forget, 29 retain
    case = case.with_(model=nn.Linear(5, 3))  # no batch norm
    terms = (Term(ascend(), "forget"), Term(likelihood(), "retain"))
    assert rows_per_update(Plan(*terms, batch_size=10, rhythm="in_turn"), case) == [
        {"forget": 10}, {"forget": 1}, {"retain": 10}, {"retain": 10}, {"retain": 9},
    ]  # fmt: skip
    together = rows_per_update(Plan(*terms, batch_size=10), case)
    assert together == [{"forget": 10, "retain": 10}, {"forget": 1, "retain": 10}, {"forget": 10, "retain": 9}]
    assert len(rows_per_update(Plan(*terms, batch_size=10, epoch_of="forget"), case)) == 2
    mixed = rows_per_update(Plan(*terms, batch_size=8, rhythm="mixed"), case)
    assert [sum(u.values()) for u in mixed] == [8] * 5
    assert sum(u.get("forget", 0) for u in mixed) == 11
    pooled = Plan(*terms, batch_size=10, rhythm="in_turn", pool={"retain": 0.5})
    assert sum(u.get("retain", 0) for u in rows_per_update(pooled, case)) == 14


def test_batch_norm_never_trains_on_one_row():
    case = make_case()
    plan = Plan(Term(ascend(), "forget"), batch_size=10)
    assert rows_per_update(plan, case) == [{"forget": 11}]
    assert rows_per_update(plan.with_(mode="eval"), case) == [{"forget": 10}, {"forget": 1}]
    one = make_case(forget=1)
    with pytest.raises(BadSetting, match="at least two rows"):
        rows_per_update(plan, one)


def test_a_mixed_batch_is_one_batch_to_batch_norm():
    case = make_case()
    plan = Plan(Term(ascend(), "forget"), Term(likelihood(), "retain"), rhythm="mixed", batch_size=40, epochs=1)
    bench = Workbench(case, copy.deepcopy(case.model))
    run_plan(plan, bench)
    x = case.model[0](case.data.column("inputs"))
    assert torch.allclose(bench.model[1].running_mean, 0.1 * x.mean(0).detach(), atol=1e-6)


def test_mixed_weights_each_term_by_its_share_of_the_batch():
    case = make_case()
    plan = Plan(Term(ascend(), "forget"), Term(likelihood(), "retain"), rhythm="mixed", batch_size=40, mode="eval",
                optimizer=Optimizer("sgd", lr=1.0))  # fmt: skip
    bench = Workbench(case, copy.deepcopy(case.model))
    run_plan(plan, bench)
    model = copy.deepcopy(case.model).eval()
    x, y = case.data.column("inputs"), case.data.column("labels")
    loss = F.cross_entropy(model(x), y, reduction="none")
    sign = torch.ones(40)
    sign[:11] = -1
    gradients = torch.autograd.grad((sign * loss).mean(), list(model.parameters()))
    for before, after, g in zip(case.model.parameters(), bench.model.parameters(), gradients, strict=True):
        assert torch.allclose(before - after, g, atol=1e-6)


def test_terms_of_one_split_share_one_forward():
    case = make_case()
    bench = Workbench(case, copy.deepcopy(case.model))
    calls = []
    # the caches of references are filled by the same network, before the first step and without gradients
    bench.model.register_forward_hook(lambda *_: calls.append(1) if torch.is_grad_enabled() else None)
    terms = (Term(ascend(), "forget"), Term(relabel(), "forget", 0.5), Term(leave(temperature=2.0), "forget", 0.1))
    run_plan(Plan(*terms, batch_size=11, epochs=2), bench)
    assert len(calls) == 2


def test_scalar_references_make_no_second_model(monkeypatch):
    case = make_case()
    made = []
    for how in ("frozen_copy", "frozen_view"):
        real = getattr(expunge.parts.references, how)
        monkeypatch.setattr(f"expunge.parts.references.{how}", lambda m, f=real: made.append(f(m)) or made[-1])
    for objective in (npo(0.1), leave(), match()):
        run_plan(Plan(Term(objective), epochs=2), Workbench(case, copy.deepcopy(case.model)))
        assert made == []
    run_plan(Plan(Term(match_features(["4"])), epochs=1), Workbench(case, copy.deepcopy(case.model)))
    assert len(made) == 1  # and that is a view: no second set of weights either
    for a, b in zip(made[0].parameters(), case.model.parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr() and not a.requires_grad


def test_cached_references_equal_a_live_copy():
    case = make_case()
    plan = Plan(Term(leave(temperature=3.0)), Term(npo(0.3), weight=0.5), epochs=4, batch_size=4, optimizer=SGD)
    cached, live = (Workbench(case, copy.deepcopy(case.model), 2) for _ in range(2))
    run_plan(plan, cached)
    live.references.prepare = lambda *_, **__: None  # never fill the caches
    run_plan(plan, live)
    for a, b in zip(cached.model.parameters(), live.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_augmented_inputs_are_seen_by_the_reference_too():
    shift = lambda batch, rng: batch.with_columns(inputs=batch["inputs"] + 1.0)  # noqa: E731
    case = make_case(augment=shift)
    bench = Workbench(case, copy.deepcopy(case.model))
    run_plan(Plan(Term(match()), epochs=2, mode="eval", optimizer=Optimizer("sgd", lr=1.0)), bench)
    # student and reference agree on the augmented batch, so nothing moves (up to rounding of the softmax)
    assert max(float((a - b).detach().abs().max()) for a, b in
               zip(bench.model.parameters(), case.model.parameters(), strict=True)) < 1e-5  # fmt: skip


def test_same_seed_same_tensors_and_another_seed_other_tensors():
    case = make_case()
    plan = Plan(Term(relabel()), Term(likelihood(), "retain"), epochs=2, optimizer=SGD, rhythm="in_turn")
    a, b, c = unlearn(case, plan, seed=1), unlearn(case, plan, seed=1), unlearn(case, plan, seed=2)
    assert same(a.model, b.model) and not same(a.model, c.model)
    torch.manual_seed(123)
    torch.rand(7)
    state = torch.random.get_rng_state()
    assert same(unlearn(case, plan, seed=1).model, a.model)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random state is left alone


def test_model_comes_back_in_its_mode_with_its_flags():
    case = make_case()
    case.model[0].weight.requires_grad_(False)
    case.model[1].eval()
    before = copy.deepcopy(case.model.state_dict())
    outcome = unlearn(case, Plan(Term(likelihood(), "retain"), epochs=1, optimizer=SGD))
    assert torch.equal(outcome.model[0].weight, case.model[0].weight) and not outcome.model[0].weight.requires_grad
    assert not outcome.model[1].training and outcome.model[0].training
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())  # the original is never changed
    assert all(p.grad is None for p in case.model.parameters())


def test_empty_plan_and_empty_request_change_nothing():
    case = make_case()
    with pytest.warns(UserWarning, match="left every weight"):
        assert same(unlearn(case, Plan()).model, case.model)
    nothing = case.with_(request=requests.none())
    assert same(unlearn(nothing, Plan(Term(likelihood(), "retain"), epochs=2)).model, case.model)


def proxy(case: Case, seed: int) -> nn.Module:
    return case.fresh(seed)


PLANS = {
    "momentum and mask": Plan(
        Term(relabel()), Term(likelihood(), "retain"), scope=salient(0.5), optimizer=SGD, epochs=3, batch_size=8,
        rhythm="in_turn",
    ),
    "adam, sam, once": Plan(
        Term(relabel(draw="once")), Term(likelihood(), "retain"), adversary=sam(0.05), optimizer=Optimizer("adam", lr=0.01),
        epochs=3, batch_size=8,
    ),
    "multiplier, average, cosine": Plan(
        Term(npo(0.5)), Term(likelihood(), "retain", Multiplier(0.2)), average=average(2, 2), epochs=3, batch_size=8,
        optimizer=Optimizer("adamw", lr=0.01, schedule="cosine", warmup=0.1),
    ),
    "proxy phase": Plan(phases=(
        Plan(Term(likelihood(), "retain"), trains=Auxiliary("proxy", proxy), epochs=2, batch_size=8, optimizer=SGD),
        Plan(Term(match("proxy")), Term(likelihood(), "retain"), rhythm="mixed", epochs=2, batch_size=8, optimizer=SGD),
    )),
    "own optimizers": Plan(
        Term(ascend(cap=2.0), optimizer=Optimizer("adam", lr=0.01)), Term(likelihood(), "retain"), epochs=2, batch_size=8,
        optimizer=SGD, stop=utility_floor(0.1),
    ),
    "adapters": Plan(Term(likelihood(), "retain"), scope=low_rank(2), epochs=2, batch_size=8, optimizer=SGD),
}  # fmt: skip


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", PLANS)
def test_a_run_stopped_anywhere_resumes_to_the_same_tensors(name, tmp_path):
    if name == "adapters":
        pytest.importorskip("peft")
    case, plan = make_case(), PLANS[name]
    whole = execute(plan, case, seed=4)
    total = whole.trace.updates
    for stop_at in (1, total // 2, total - 1):
        folder = tmp_path / f"{stop_at}"
        calls = []

        def kill(*_, calls=calls, stop_at=stop_at):
            calls.append(1)
            if len(calls) == stop_at:
                raise Killed

        with RunDirectory(folder) as run, pytest.raises(Killed):
            execute(plan, case, seed=4, run=run, identity="x", checkpoint_steps=2, report=kill)
        with RunDirectory(folder) as run:
            rest = execute(plan, case, seed=4, run=run, identity="x", checkpoint_steps=2)
        assert same(rest.model, whole.model), (name, stop_at)
        assert rest.trace.updates == total and len(rest.trace.history) == len(whole.trace.history)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == total


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    from expunge.errors import BadCheckpoint

    case, plan = make_case(), PLANS["momentum and mask"]
    with RunDirectory(tmp_path) as run:
        execute(plan, case, run=run, identity="one", checkpoint_steps=1)
        with pytest.raises(BadCheckpoint, match="another"):
            execute(plan, case, run=run, identity="two", checkpoint_steps=1)
    assert Checkpointer(Path(tmp_path), "one").load() is not None


def test_missing_reference_names_what_there_is():
    case = make_case()
    with pytest.raises(UnmetNeed, match="original"):
        run_plan(Plan(Term(match("teacher"))), Workbench(case, copy.deepcopy(case.model)))


def test_regression_runs_the_same_objectives():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0])
    case = Case(nn.Linear(4, 1), (x, y), requests.where("labels", ">", 1.0), task=Regression(error="mse"),
                recipe=Training(epochs=60, batch_size=16, optimizer=Optimizer("adam", lr=0.05)))  # fmt: skip
    case = case.with_(model=fit(case, "train", 0))
    assert case.task.evaluate(case.model, case.split("train").batches())["rmse"] < 0.1
    for objective in (relabel(), npo(0.1), match("random"), ascend()):
        outcome = unlearn(case, Plan(Term(objective), epochs=2, optimizer=Optimizer("sgd", lr=0.05)), floor=None)
        forget = lambda m: case.task.evaluate(m, case.split("forget").batches())["loss"]  # noqa: E731
        assert forget(outcome.model) > forget(case.model)


def test_losses_are_read_after_the_step_is_under_way(monkeypatch: pytest.MonkeyPatch):
    """On a GPU to read a number is to wait, and a step that is only then prepared leaves the device idle."""
    from expunge.engine.gradients import Gradients

    seen: list[str] = []
    step, read = MaskedOptimizer.step, Gradients.read
    monkeypatch.setattr(MaskedOptimizer, "step", lambda self: (seen.append("step"), step(self))[1])
    monkeypatch.setattr(Gradients, "read", lambda self, *given: (seen.append("read"), read(self, *given))[1])
    fit(make_case(), "retain", 0, recipe=Training(epochs=1, batch_size=10))
    assert seen == ["step", "read"] * 3


@pytest.mark.parametrize(("rhythm", "order"), [("together", "fbfb"), ("mixed", "fb")])
def test_a_split_goes_back_before_the_next_goes_forward(rhythm: str, order: str):
    """Its activations are then gone: the peak holds those of one split, not of all. One joint pass has one way back."""
    case, seen = make_case(), []
    layer = next(m for m in case.model.modules() if isinstance(m, nn.Linear))
    layer.register_forward_hook(lambda *_: seen.append("f") if torch.is_grad_enabled() else None)
    layer.register_full_backward_hook(lambda *_: seen.append("b"))
    plan = Plan(
        Term(likelihood(), on="forget", weight=0.5), Term(likelihood(), on="retain"), optimizer=SGD, epochs=1, batch_size=4,
        rhythm=rhythm,
    )  # fmt: skip
    execute(plan, case, in_place=True, floor=None)
    assert "".join(seen).startswith(order) and "".join(seen).count("b") > 1
    assert "".join(seen).replace(order, "") == ""


@pytest.mark.parametrize("wrap", [lambda o: o, Clean], ids=["plain", "wrapped"])
def test_a_term_that_reads_another_splits_step_keeps_its_graph(wrap):
    """Going back split by split would free the forget rows' graph under the term that reads them beside its own; the gradient is
    autograd's of the whole sum."""
    case = make_case()
    terms = Term(wrap(align("0")), on="retain"), Term(ascend(), on="forget", weight=0.5)
    bench = Workbench(case, copy.deepcopy(case.model), 0)
    seen: list[list[torch.Tensor]] = []
    step = MaskedOptimizer.step

    def caught(self):
        seen.append([p.grad.clone() for p in self.parameters])
        step(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MaskedOptimizer, "step", caught)
        run_plan(Plan(*terms, optimizer=SGD, batch_size=40, epochs=1, mode="eval", rhythm="together"), bench)
    model, old = copy.deepcopy(case.model).eval(), copy.deepcopy(case.model).eval()
    x, y = case.data.column("inputs"), case.data.column("labels")

    def turned(rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            before = old[0](x[rows])
        return 1 - F.cosine_similarity(model[0](x[rows]), before, dim=1)

    forget, retain = case.splits["forget"].ids, case.splits["retain"].ids
    whole = (contrast(turned(retain), turned(forget), 20.0) * len(retain)).mean()
    whole = whole - 0.5 * F.cross_entropy(model(x[forget]), y[forget])
    found = torch.autograd.grad(whole, list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(seen[0], found, strict=True))


def test_choices_are_counted_where_the_columns_are():
    batch = Batch(torch.arange(3), {"inputs": torch.empty(3, 2, device="meta")})
    assert Classification().choices(batch).device.type == "meta"
