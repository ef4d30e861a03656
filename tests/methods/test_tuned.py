"""The tuned methods against the truth: steps by hand, slow loops, invariances, and the cards' measured inequalities."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge import Case, Optimizer, TensorData, Training, requests, unlearn
from expunge.engine import RunDirectory, Workbench, execute, fit
from expunge.methods import find
from expunge.parts import class_noise, nearest_class, pruned, relabel
from expunge.parts.proximal import soft_threshold
from expunge.parts.rewind import rewind
from expunge.parts.scopes.pruning import synflow
from expunge.seeds import derive
from toys import digits, mlp, toy

ALL = 10_000
"""A batch size that holds every row: one step is the gradient of the mean over the whole split."""


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def make_case(n: int = 40, forget: int = 11, seed: int = 0, request: Any = None) -> Case:
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(n, 5, generator=g), torch.randint(0, 3, (n,), generator=g)
    xt, yt = torch.rand(20, 5, generator=g), torch.randint(0, 3, (20,), generator=g)
    torch.manual_seed(seed)
    return Case(build(), (x, y), request or requests.samples(range(forget)), test=(xt, yt), build=build,
                recipe=Training(epochs=2, batch_size=8, optimizer=Optimizer("sgd", lr=0.05)))  # fmt: skip


def rows(case: Case, split: str) -> tuple[Tensor, Tensor]:
    batch = case.data.fetch(case.split(split).ids)
    return batch["inputs"], batch["labels"]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def run(case: Case, name: str, **settings: Any) -> nn.Module:
    return unlearn(case, name, floor=None, **settings).model


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def close(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], atol=1e-6, rtol=1e-5)


def stepped(case: Case, gradient: dict[str, Tensor], lr: float) -> dict[str, Tensor]:
    return {n: (p - lr * gradient[n]).detach() for n, p in case.model.named_parameters()}


# -- one step by hand --------------------------------------------------------------------------------------------------
def test_neggrad_plus_takes_the_step_of_its_equation():
    case, a, lr = make_case(), 0.8, 0.3
    (xf, yf), (xr, yr) = rows(case, "forget"), rows(case, "retain")
    model = case.model
    loss = a * F.cross_entropy(model(xr), yr) - (1 - a) * F.cross_entropy(model(xf), yf)
    after = run(case, "neggrad_plus", alpha=a, lr=lr, epochs=1, batch_size=ALL, momentum=0.0)
    close(after, stepped(case, gradients(model, loss), lr))


def test_an_epoch_of_neggrad_plus_is_one_pass_of_retain():
    outcome = unlearn(make_case(), "neggrad_plus", epochs=2, batch_size=4, floor=None)
    assert outcome.record["updates"] == 2 * 8  # ceil(29 / 4): the 11 forget rows go round
    assert all(len(h["losses"]) == 2 for h in outcome.record["history"])


def test_grad_ascent_climbs_and_a_cap_ends_the_pull():
    case, lr = make_case(), 0.2
    x, y = rows(case, "forget")
    after = run(case, "grad_ascent", lr=lr, epochs=1, batch_size=ALL, momentum=0.0)
    close(after, stepped(case, gradients(case.model, -F.cross_entropy(case.model(x), y)), lr))
    lowest = float(F.cross_entropy(case.model(x), y, reduction="none").min().detach())
    assert same(run(case, "grad_ascent", lr=lr, cap=lowest * 0.99), case.model)
    highest = float(F.cross_entropy(case.model(x), y, reduction="none").max().detach())
    one = run(case, "grad_ascent", lr=lr, epochs=1, batch_size=ALL, momentum=0.0, cap=highest * 1.01)
    close(one, {n: p.detach() for n, p in after.named_parameters()})


def test_grad_ascent_can_stop_at_holdout():
    t = toy("class")
    outcome = unlearn(t.case, "grad_ascent", lr=0.005, epochs=30, batch_size=64, until="holdout")
    assert "reached holdout" in outcome.record["ended"]
    losses = [t.measure(outcome.model, s)["loss"] for s in ("forget", "holdout")]
    assert losses[0] >= losses[1] and losses[0] < 3  # stopped in time, not run away


def test_npo_tends_to_ascent_as_beta_falls():
    case = make_case()
    more = {"lr": 0.1, "epochs": 6, "batch_size": ALL, "momentum": 0.0}
    ascent = run(case, "grad_ascent", **more)

    def distance(beta: float) -> float:
        after = run(case, "npo", beta=beta, alpha=0.0, **more)
        return sum(
            float((p - q).detach().abs().sum()) for p, q in zip(after.parameters(), ascent.parameters(), strict=True)
        )

    far = [distance(beta) for beta in (1.0, 0.1, 0.01)]
    # the gradient's weight is 2 / (1 + (p_o/p)^beta) = 1 - O(beta): ten times smaller beta, ten times nearer
    assert far[0] > 5 * far[1] > 25 * far[2] and far[0] > 1e-2


def test_npo_with_retain_is_one_equation():
    case, lr, alpha = make_case(), 0.2, 0.5
    (xf, yf), (xr, yr) = rows(case, "forget"), rows(case, "retain")
    model = case.model
    loss = -F.cross_entropy(model(xf), yf) + alpha * F.cross_entropy(model(xr), yr)  # at theta_o NPO's weight is 1
    close(run(case, "npo", alpha=alpha, lr=lr, epochs=1, batch_size=ALL), stepped(case, gradients(model, loss), lr))


def test_bad_teacher_targets_the_random_network_on_forget_and_the_original_on_retain():
    case, lr = make_case(), 0.01
    model = copy.deepcopy(case.model)
    teacher = case.fresh(derive(0, "random teacher"))
    (xf, _), (xr, _) = rows(case, "forget"), rows(case, "retain")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(2):
        x = torch.cat([xf, xr])
        with torch.no_grad():
            target = torch.cat([teacher(xf).softmax(-1), case.model(xr).softmax(-1)])
        loss = F.kl_div(model(x).log_softmax(-1), target, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = run(case, "bad_teacher", lr=lr, epochs=2, batch_size=ALL, retain_share=1.0)
    for p, q in zip(after.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_bad_teacher_passes_a_share_of_retain():
    outcome = unlearn(make_case(n=111, forget=11), "bad_teacher", retain_share=0.3, batch_size=1)
    seen = [list(h["losses"])[0] for h in outcome.record["history"]]
    assert sum("[retain]" in name for name in seen) == 30 and sum("[forget]" in name for name in seen) == 11


def test_l1_sparse_takes_the_step_of_its_equation_and_decays():
    case, lr, gamma = make_case(), 0.05, 0.03
    model = copy.deepcopy(case.model)
    x, y = rows(case, "retain")
    epochs, rest = 4, 1
    for e in range(epochs):
        weight = gamma * (1 - e / (epochs - rest)) if e < epochs - rest else 0.0
        g = gradients(model, F.cross_entropy(model(x), y))
        with torch.no_grad():
            for n, p in model.named_parameters():
                p -= lr * (g[n] + weight * p.sign())
    after = run(
        case, "l1_sparse", gamma=gamma, rest=rest, lr=lr, epochs=epochs, batch_size=ALL, momentum=0.0, weight_decay=0.0
    )
    close(after, {n: p.detach() for n, p in model.named_parameters()})


def test_amnesiac_labels_are_wrong_and_stay():
    case, lr = make_case(), 0.01
    bench = Workbench(case, copy.deepcopy(case.model), 0)
    table = relabel("other", draw="once").prepare(bench, "forget")
    x, y = rows(case, "forget")
    assert bool((table[case.split("forget").ids] != y).all())
    # the same run by hand, with the labels that the table holds
    (xr, yr), model = rows(case, "retain"), copy.deepcopy(case.model)
    x, y = torch.cat([x, xr]), torch.cat([table[case.split("forget").ids], yr])
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    after = run(case, "amnesiac_relabel", lr=lr, epochs=4, batch_size=ALL)
    for p, q in zip(after.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


# -- SalUn and its kin -------------------------------------------------------------------------------------------------
def test_salun_freezes_exactly_one_minus_density():
    case, density = make_case(), 0.3
    x, y = rows(case, "forget")
    scores = torch.cat([g.abs().reshape(-1) for g in gradients(case.model, F.cross_entropy(case.model(x), y)).values()])
    allowed = torch.zeros(len(scores), dtype=torch.bool)
    allowed[scores.topk(int(density * len(scores))).indices] = True
    after = run(case, "salun", density=density, lr=0.05, weight_decay=0.01)
    flat = lambda m: torch.cat([p.detach().reshape(-1) for p in m.parameters()])  # noqa: E731
    a, b = flat(case.model), flat(after)
    assert torch.equal(a[~allowed], b[~allowed])
    assert bool((a[allowed] != b[allowed]).all()) and int(allowed.sum()) == int(0.3 * len(a))


@pytest.mark.parametrize("policy", ["other", "uniform"])
def test_random_labels_are_salun_at_density_one(policy):
    case = make_case()
    a = run(case, "salun", density=1.0, policy=policy, batch_size=8, seed=3)
    assert same(a, run(case, "random_labels", policy=policy, batch_size=8, seed=3))
    assert not same(a, run(case, "random_labels", policy=policy, batch_size=8, seed=4))


def test_soft_threshold_equals_the_slow_loop():
    g = torch.Generator().manual_seed(0)
    anchors = [torch.randn(3, 4, generator=g), torch.randn(5, generator=g)]
    moved = [a + 0.1 * torch.randn(a.shape, generator=g) for a in anchors]
    share, progress = 0.6, 0.25
    sizes = sorted(abs(float(p - q)) for a, m in zip(anchors, moved, strict=True)
                   for p, q in zip(m.reshape(-1), a.reshape(-1), strict=True))  # fmt: skip
    rank = int(share * 17 * (1 - progress))
    tau = sizes[rank - 1]
    got = [m.clone() for m in moved]
    soft_threshold(share).apply(got, anchors, progress)
    for a, m, r in zip(anchors, moved, got, strict=True):
        for p, q, found in zip(a.reshape(-1).tolist(), m.reshape(-1).tolist(), r.reshape(-1).tolist(), strict=True):
            d = q - p
            assert found == pytest.approx(p + (1 if d > 0 else -1) * max(abs(d) - tau, 0), abs=1e-6)
    assert sum(int((r == a).sum()) for a, r in zip(anchors, got, strict=True)) == rank  # bit for bit back
    last = [m.clone() for m in moved]
    soft_threshold(share).apply(last, anchors, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(last, moved, strict=True))


def test_salun_soft_holds_nothing_at_share_zero_and_much_at_first():
    case = make_case()
    assert same(run(case, "salun_soft", share=0.0, batch_size=8), run(case, "random_labels", batch_size=8))
    after = run(case, "salun_soft", share=0.5, epochs=1, batch_size=ALL)  # two updates: half way, then none held
    assert not same(after, run(case, "random_labels", epochs=1, batch_size=ALL))


def _gap(t: Any, model: nn.Module) -> float:
    """Mean absolute difference to `retrained` of ua, ra and ta, in points."""
    return 100 * sum(abs(t.accuracy(model, s) - t.accuracy(t.retrained, s)) for s in ("forget", "retain", "test")) / 3


def test_the_gap_inequalities_of_the_card():
    settings = {"lr": 0.02, "batch_size": 64}
    t = toy("class")
    gaps = {n: _gap(t, unlearn(t.case, n, **settings).model) for n in ("salun", "random_labels", "fine_tune")}
    assert gaps["salun"] <= 1 and gaps["salun"] < gaps["fine_tune"] / 10
    assert abs(gaps["salun"] - gaps["random_labels"]) <= 1
    t = toy("mislabelled")
    gaps = {
        n: _gap(t, unlearn(t.case, n, **settings).model) for n in ("salun", "random_labels", "fine_tune", "grad_ascent")
    }
    assert gaps["salun"] < gaps["fine_tune"] and gaps["salun"] < gaps["grad_ascent"]
    assert abs(gaps["salun"] - gaps["random_labels"]) <= 1


# -- SCRUB -------------------------------------------------------------------------------------------------------------
SCRUB = {"lr": 0.05, "epochs": 5, "msteps": 2, "alpha": 0.3, "forget_batch_size": 4, "retain_batch_size": 10}


def test_scrub_maximises_in_its_first_epochs_only_and_before_it_minimises():
    outcome = unlearn(make_case(), "scrub", floor=None, **SCRUB)
    for epoch in range(1, 6):
        updates = [h["losses"] for h in outcome.record["history"] if h["epoch"] == epoch]
        passes = ["f" if any("[forget]" in k for k in losses) else "r" for losses in updates]
        assert "".join(passes) == ("fff" if epoch <= 2 else "") + "rrr"  # 11 rows by 4, 29 rows by 10
    forget = [v for h in outcome.record["history"] for k, v in h["losses"].items() if "[forget]" in k]
    assert forget[0] == pytest.approx(0.0, abs=1e-6) and forget[-1] < -1e-4  # the student leaves the teacher


def test_scrub_equals_its_equation_by_hand():
    case, lr, T, gamma, alpha = make_case(), 0.1, 4.0, 0.7, 0.3
    model, teacher = copy.deepcopy(case.model), case.model
    (xf, _), (xr, yr) = rows(case, "forget"), rows(case, "retain")

    def divergence(x: Tensor) -> Tensor:
        target = (teacher(x) / T).softmax(-1).detach()
        return F.kl_div((model(x) / T).log_softmax(-1), target, reduction="batchmean") * T**2

    for epoch in range(3):
        for which in ("forget", "retain") if epoch < 2 else ("retain",):
            loss = (
                -divergence(xf)
                if which == "forget"
                else gamma * F.cross_entropy(model(xr), yr) + alpha * divergence(xr)
            )
            g = gradients(model, loss)
            rate = lr * (0.1 if epoch >= 1 else 1.0)
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p -= rate * g[n]
    after = run(case, "scrub", lr=lr, epochs=3, msteps=2, gamma=gamma, alpha=alpha, temperature=T, momentum=0.0,
                weight_decay=0.0, forget_batch_size=ALL, retain_batch_size=ALL, milestones=(1,))  # fmt: skip
    for p, q in zip(after.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_rewind_returns_the_epoch_that_the_slow_loop_finds():
    t = toy("mislabelled")
    settings = {
        "optimizer": "adam",
        "lr": 3e-3,
        "weight_decay": 0.0,
        "msteps": 4,
        "temperature": 2.0,
        "alpha": 0.5,
        "milestones": (),
    }
    runs = [
        unlearn(t.case, "scrub", epochs=e, **settings).model for e in range(1, 5)
    ]  # a run of e epochs is epoch e of a longer one
    forget = [t.accuracy(m, "forget") for m in runs]
    reference = t.accuracy(runs[-1], "holdout")
    wanted = max(range(4), key=lambda e: (-abs(forget[e] - reference), e))
    outcome = unlearn(t.case, "scrub", epochs=4, rewind=True, **settings)
    assert outcome.record["notes"]["rewound_to_epoch"] == wanted + 1
    assert same(outcome.model, runs[wanted])


def test_rewind_prefers_the_nearest_and_of_equals_the_latest():
    assert rewind().choose([0.9, 0.4, 0.1], 0.45) == 1
    assert rewind().choose([0.5, 0.2, 0.5], 0.5) == 2


# -- boundary ----------------------------------------------------------------------------------------------------------
def test_boundary_neighbours_are_never_the_true_class_and_equal_the_slow_attack():
    t = toy("class")
    bench = Workbench(t.case, copy.deepcopy(t.original))
    ids = t.case.split("forget").ids
    truth = t.case.data.column("labels")[ids]
    labels = nearest_class(0.1, misses="again").prepare(bench, "forget")[ids]
    assert bool((labels != truth).all()) and bool((labels >= 0).all())
    rate = bench.notes["boundary_hit_rate"]
    single = nearest_class(0.1, misses="keep").prepare(Workbench(t.case, copy.deepcopy(t.original)), "forget")[ids]
    slow = []
    for x, y in zip(t.case.data.column("inputs")[ids], truth, strict=True):
        x = x[None].clone().requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(t.original(x), y[None]), x)
        slow.append(int(t.original((x + 0.1 * g.sign()).clamp(0, 1)).argmax()))
    assert single.tolist() == slow
    assert rate == pytest.approx(sum(s != int(y) for s, y in zip(slow, truth, strict=True)) / len(slow))
    assert 0.2 < rate < 0.8  # what the re-attack is for


def test_boundary_shrink_leaves_rows_without_neighbour_out_of_the_mean():
    case, lr = make_case(), 0.2
    bench = Workbench(case, copy.deepcopy(case.model))
    for radius in (0.05, 0.1, 0.2, 0.3, 0.4):
        labels = nearest_class(radius, misses="drop").prepare(bench, "forget")[case.split("forget").ids]
        if 0 < int((labels < 0).sum()) < len(labels):
            break
    live = labels >= 0
    assert 0 < int(live.sum()) < len(labels)
    x, _ = rows(case, "forget")
    loss = F.cross_entropy(case.model(x[live]), labels[live])
    after = run(case, "boundary_shrink", radius=radius, misses="drop", lr=lr, epochs=1, batch_size=ALL, momentum=0.0)
    close(after, stepped(case, gradients(case.model, loss), lr))


def test_boundary_expand_adds_a_class_and_takes_it_away():
    t = toy("class")
    outcome = unlearn(t.case, "boundary_expand", lr=1e-3)
    head = outcome.model[-1]
    assert {k: v.shape for k, v in outcome.model.state_dict().items()} == {
        k: v.shape for k, v in t.original.state_dict().items()
    }
    assert head.out_features == 10 and t.original[-1].out_features == 10
    assert t.accuracy(outcome.model, "forget") < 0.1 < t.accuracy(outcome.model, "retain")
    ruined = unlearn(t.case, "boundary_expand", lr=1.0, epochs=3)  # a rollback meets K + 1 outputs, and gives back K
    assert ruined.record["restored"] and same(ruined.model, t.original)


# -- UNSIR -------------------------------------------------------------------------------------------------------------
UNSIR = {"batch_size": 64, "impair_lr": 0.01, "repair_lr": 0.01, "noise_rows": 32}


def test_unsir_never_reads_a_forget_row():
    t = toy("class")
    case, ids = t.case, t.case.split("forget").ids
    x = case.data.column("inputs").clone()
    x[ids] = torch.rand(len(ids), 64, generator=torch.Generator().manual_seed(9))
    other = case.with_(data=TensorData(inputs=x, labels=case.data.column("labels")))
    a, b = unlearn(case, "unsir", **UNSIR), unlearn(other, "unsir", **UNSIR)
    assert same(a.model, b.model) and not same(a.model, t.original)
    assert t.accuracy(a.model, "forget") < 0.1 and t.accuracy(a.model, "retain") > 0.9
    fitted = unlearn(other, "random_labels", epochs=1).model  # the instrument does see a method that reads them
    assert not same(fitted, unlearn(case, "random_labels", epochs=1).model)


def test_unsir_noise_carries_its_own_class_and_is_what_the_model_denies():
    case = make_case(request=requests.where("labels", ">=", 1))
    noise = class_noise(4).build(case, 0)
    assert noise.labels.tolist() == [1] * 4 + [2] * 4 and noise.values.shape == (8, 5)
    t = toy("class")
    history = unlearn(t.case, "unsir", **UNSIR).record["history"]
    values = [next(iter(h["losses"].values())) for h in history if h["phase"] == 0]
    assert len(values) == 5 * 8 and values[-1] < values[0] - 1  # error of the noise's class rises


def test_unsir_needs_a_class():
    t = toy("mislabelled")
    with pytest.raises(Exception, match="whole classes"):
        unlearn(t.case, "unsir")


# -- layers and sparsity -----------------------------------------------------------------------------------------------
def test_eu_k_owes_nothing_to_the_layers_it_redraws():
    case = make_case()
    other = case.with_(model=copy.deepcopy(case.model))
    with torch.no_grad():
        other.model[2].weight.add_(1.0)
        other.model[2].bias.sub_(2.0)
    a, b = run(case, "eu_k", k=1), run(other, "eu_k", k=1)
    assert same(a, b)
    assert torch.equal(a[0].weight, case.model[0].weight) and not torch.equal(a[2].weight, case.model[2].weight)
    assert not same(run(case, "cf_k", k=1), run(other, "cf_k", k=1))  # CF-k still remembers
    assert not torch.equal(run(case, "eu_k", k=2)[0].weight, case.model[0].weight)


@pytest.fixture(scope="module")
def card_case() -> Case:
    """The card's setting (MLP 64-256-128-10, 1000 training digits, SGD .05 cosine, class 3 to forget), half as long."""
    x, y, xt, yt = digits(1000)
    wide = lambda: mlp(64, (256, 128))  # noqa: E731
    recipe = Training(epochs=30, batch_size=64, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9, schedule="cosine"))
    case = Case(wide(), TensorData(inputs=x, labels=y), requests.label(3), test=TensorData(inputs=xt, labels=yt),
                recipe=recipe, build=wide)  # fmt: skip
    return case.with_(model=fit(case, "train", 0))


def _accuracy(case: Case, model: nn.Module, split: str) -> float:
    return case.task.evaluate(model, case.split(split).batches())["accuracy"]


def test_l1_sparse_forgets_more_with_more_gamma(card_case):
    runs = [unlearn(card_case, "l1_sparse", gamma=g, lr=0.02, batch_size=64).model for g in (0.0, 5e-4, 1e-3, 2e-3)]
    ua = [1 - _accuracy(card_case, m, "forget") for m in runs]
    assert ua == sorted(ua) and ua[-1] > ua[0] + 0.1
    assert all(_accuracy(card_case, m, "retain") >= 0.99 for m in runs)


def test_l1_sparse_at_gamma_zero_is_fine_tuning():
    case = make_case()
    assert same(
        run(case, "l1_sparse", gamma=0.0, lr=0.01, batch_size=8, weight_decay=0.0), run(case, "fine_tune", batch_size=8)
    )


def test_l1_sparse_more_than_halves_the_gap_of_fine_tuning():
    t = toy("class")
    l1 = _gap(t, unlearn(t.case, "l1_sparse", gamma=3e-3, lr=0.05, batch_size=64).model)
    assert l1 < _gap(t, unlearn(t.case, "fine_tune", lr=0.05, batch_size=64).model) / 2


@pytest.mark.parametrize("score", ["magnitude", "synflow"])
def test_pruned_weights_stay_exactly_zero(score):
    t = toy("class")
    outcome = unlearn(t.case, "prune_first", rate=0.9, score=score, sparse_epochs=2, epochs=2, lr=0.02, batch_size=64)
    hidden = [p for n, p in outcome.model.named_parameters() if n in ("0.weight", "2.weight")]
    total = sum(p.numel() for p in hidden)
    assert sum(int((p != 0).sum()) for p in hidden) == int((1 - 0.9) * total)
    assert bool((outcome.model[4].weight != 0).all())  # the head is not pruned
    if score == "magnitude":
        weights = torch.cat([t.original[i].weight.detach().abs().reshape(-1) for i in (0, 2)])
        kept = torch.cat([(p != 0).reshape(-1) for p in hidden])
        assert weights[kept].min() >= weights[~kept].max()


def test_fine_tuning_forgets_more_when_sparse():
    t = toy("class")
    more = {"lr": 0.05, "epochs": 10, "batch_size": 64, "momentum": 0.9}
    dense = 1 - t.accuracy(unlearn(t.case, "fine_tune", **more).model, "forget")
    sparse = unlearn(t.case, "prune_first", rate=0.95, sparse_epochs=5, **more)
    assert 1 - t.accuracy(sparse.model, "forget") > dense + 0.2


def test_synflow_scores_equal_the_closed_form_of_two_layers():
    case = make_case()
    bench = Workbench(case, nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)))
    a, b = (bench.model[i].weight.detach().abs() for i in (0, 1))
    scores = {"0.weight": a * b.sum(0)[:, None], "1.weight": b * a.sum(1)[None, :]}  # |w dR/dw|, R = 1^T |B| |A| 1
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    keep = synflow(bench, ["0.weight", "1.weight"], 0.5, rounds=1)
    kept = torch.cat([m.reshape(-1) for m in keep.values()])
    assert int(kept.sum()) == 16 and flat[kept].min() >= flat[~kept].max()
    assert flat[:20].sum() == pytest.approx(float(flat[20:].sum()), rel=1e-5)  # flow is conserved from layer to layer


def test_pruning_needs_something_to_prune():
    case = make_case()
    with pytest.raises(ValueError, match="matches"):
        unlearn(case, "prune_first", layers=("no such layer",))
    mask = pruned(0.5, layers=("2.weight",)).select(Workbench(case, copy.deepcopy(case.model)))
    assert mask["0.weight"] is True and int(mask["2.weight"].sum()) == 12


# -- all of them: a stopped run goes on to the same tensors ------------------------------------------------------------
class Killed(Exception):
    pass


STOPPED = {
    "prune_first": {"rate": 0.5, "epochs": 2, "batch_size": 8},
    "unsir": {"noise_rows": 4, "noise_epochs": 1, "noise_steps": 2, "batch_size": 12, "repair_epochs": 2},
    "scrub": {**SCRUB, "rewind": True},
    "salun_soft": {"epochs": 2, "batch_size": 8},
    "boundary_expand": {"lr": 0.05, "epochs": 3, "batch_size": 4},
    "boundary_shrink": {"lr": 0.05, "epochs": 3, "batch_size": 4},
    "eu_k": {"epochs": 2, "batch_size": 8},
    "amnesiac_relabel": {"batch_size": 8},
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_goes_on_to_the_same_tensors(name, tmp_path):
    case = make_case(request=requests.label(1))
    plan = find(name).configure(**STOPPED[name]).action(case)
    whole = execute(plan, case, seed=4)
    total = whole.trace.updates
    for stop_at in (2, total // 2, total - 1):
        calls = []

        def kill(*_, calls=calls, stop_at=stop_at):
            calls.append(1)
            if len(calls) == stop_at:
                raise Killed

        with RunDirectory(tmp_path / str(stop_at)) as directory, pytest.raises(Killed):
            execute(plan, case, seed=4, run=directory, identity="x", checkpoint_steps=1, report=kill)
        with RunDirectory(tmp_path / str(stop_at)) as directory:
            rest = execute(plan, case, seed=4, run=directory, identity="x", checkpoint_steps=1)
        assert same(rest.model, whole.model), (name, stop_at)
