"""SSD, LFSSD, Fisher forgetting, influence: each against the slow loop or the dense closed form, and the card's
numbers."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge import Case, Optimizer, TensorData, Training, prepare, requests, unlearn
from expunge.engine import Workbench, fit
from expunge.engine.layout import channels_last
from expunge.errors import BadData, BadSetting, EmptyScope, ExpungeWarning, UnmetNeed
from expunge.methods.edited.fisher import noise_variance, own_label_fisher
from expunge.methods.edited.influence import retain_gradients, woodbury, woodfisher
from expunge.methods.edited.ssd import dampen, importance, selected
from expunge.methods.state import save_state
from toys import digits, mlp


@cache
def card_case(seed: int = 0) -> Case:
    """The card's setting: digits 1000/797, MLP 64-256-128-10, class 3."""
    x, y, x_test, y_test = digits(1000)
    build = lambda: mlp(64, (256, 128), 10)  # noqa: E731
    recipe = Training(epochs=40, batch_size=64, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9, schedule="cosine"))
    case = Case(build(), (x, y), requests.label(3), test=(x_test, y_test), recipe=recipe, build=build)
    return case.with_(model=fit(case, "train", seed))


def tiny(rows: int = 60, classes: int = 3, hidden: tuple[int, ...] = (5,), forget: int = 20) -> Case:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, 4, generator=rng), torch.randint(0, classes, (rows,), generator=rng)
    torch.manual_seed(0)
    return Case(
        mlp(4, hidden, classes).double(), TensorData(inputs=x.double(), labels=y), requests.samples(range(forget))
    )


def accuracy(case: Case, model: nn.Module, split: str) -> float:
    return 100 * case.task.evaluate(model, case.split(split).batches())["accuracy"]


def slow_importance(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, size: int, label_free: bool = False
) -> list[torch.Tensor]:
    """The official loop, one parameter at a time."""
    total, batches = [torch.zeros_like(p) for p in model.parameters()], 0
    for start in range(0, len(x), size):
        model.zero_grad()
        out = model(x[start : start + size])
        (out.pow(2).sum(1).mean() if label_free else F.cross_entropy(out, y[start : start + size])).backward()
        for t, p in zip(total, model.parameters(), strict=True):
            t += p.grad.clone().abs() if label_free else p.grad.clone().pow(2)
        batches += 1
    return [t / batches for t in total]


# -- SSD ---------------------------------------------------------------------------------------------------------------
def test_ssd_meets_the_cards_inequalities():
    case = card_case()
    runs = {alpha: unlearn(case, "ssd", alpha=alpha, floor=None) for alpha in (10.0, 20.0, 30.0)}
    assert any(
        accuracy(case, o.model, "forget") <= 1 and accuracy(case, o.model, "retain") >= 97 for o in runs.values()
    )
    fractions = [o.record["notes"]["selected_fraction"] for o in runs.values()]
    assert fractions[0] >= fractions[1] >= fractions[2] > 0
    for outcome in runs.values():
        changed, total = 0, 0
        for a, b in zip(case.model.parameters(), outcome.model.parameters(), strict=True):
            assert (b.abs() <= a.abs()).all()
            changed, total = changed + int((a != b).sum()), total + a.numel()
        # unselected weights are the same bits: no more weights changed than were selected
        assert changed <= round(outcome.record["notes"]["selected_fraction"] * total)


@pytest.mark.parametrize("label_free", [False, True])
def test_ssd_equals_the_slow_loop(label_free: bool):
    case, alpha, lam = card_case(), 4.0, 0.8
    x, y = case.data.columns["inputs"], case.data.columns["labels"]
    retain, forget = case.split("retain").ids, case.split("forget").ids
    if not label_free:
        retain = retain[torch.sort(y[retain], stable=True).indices]
    everything = torch.cat([retain, forget])
    model = deepcopy(case.model)
    I_D = slow_importance(model, x[everything], y[everything], 64, label_free)
    I_F = slow_importance(model, x[forget], y[forget], 64, label_free)
    outcome = unlearn(case, "lfssd" if label_free else "ssd", alpha=alpha, lam=lam, order="grouped", floor=None)
    count = 0
    for before, after, d, f in zip(model.parameters(), outcome.model.parameters(), I_D, I_F, strict=True):
        mine = before.detach().clone()
        chosen = torch.where(f > alpha * d)
        mine[chosen] = mine[chosen] * ((lam * d) / f)[chosen].clamp(max=1)
        count += len(chosen[0])
        assert torch.equal(mine, after)
    assert count > 0
    assert outcome.record["notes"]["selected_fraction"] == pytest.approx(
        count / sum(p.numel() for p in model.parameters())
    )


def test_convolutions_are_measured_channels_last_and_left_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(5 * 4 * 4, 3)).eval().double()
    x, y = torch.randn(50, 2, 8, 8).double(), torch.randint(0, 3, (50,))
    case = Case(model, TensorData(inputs=x, labels=y), requests.samples(range(20)))
    layouts = [p.stride() for p in model.parameters()]
    found = importance(Workbench(case, model), "forget", batch_size=8)
    for (name, mine), slow in zip(found.items(), slow_importance(model, x[:20], y[:20], 8), strict=True):
        assert torch.allclose(mine, slow, rtol=1e-12, atol=0) and mine.is_contiguous(), name
    assert [p.stride() for p in model.parameters()] == layouts
    with channels_last(model):
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last) and not model[0].weight.is_contiguous()


def test_dampen_by_hand():
    theta = torch.tensor([2.0, 2.0, 2.0, 2.0])
    I_D, I_F = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([4.0, 3.9, 0.0, 1.0])
    assert selected(I_D, I_F, 3.95).tolist() == [True, False, False, False]
    assert dampen(theta, I_D, I_F, 3.95, 1.0).tolist() == [0.5, 2.0, 2.0, 2.0]  # 0/0 is not selected
    assert dampen(theta, I_D, I_F, 0.5, 8.0).tolist() == [2.0, 2.0, 2.0, 2.0]  # capped at 1: nothing grows
    assert dampen(theta, torch.zeros(4), torch.ones(4), 1.0, 1.0).tolist() == [0.0] * 4


def test_stored_importance_is_used_for_the_same_weights_only():
    case = card_case()
    first = unlearn(case, "ssd", alpha=20, floor=None)
    again = unlearn(case, "ssd", alpha=20, floor=None, state=first.state)
    assert not first.record["notes"]["stored_importance_used"] and again.record["notes"]["stored_importance_used"]
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    moved = case.with_(model=first.model, request=requests.label(5))
    assert not unlearn(moved, "ssd", alpha=20, floor=None, state=first.state).record["notes"]["stored_importance_used"]
    stale = unlearn(moved, "ssd", alpha=20, floor=None, state=first.state, stored="always")
    assert stale.record["notes"]["stored_importance_used"]
    assert any("before this request, and on other weights" in w for w in stale.warnings)
    assert any("before this request; the pass" in w for w in again.warnings)
    assert not any("before this request" in w for w in first.warnings)  # what a request costs says what it leaves out
    other = unlearn(case, "ssd", alpha=20, floor=None, state=first.state, batch_size=32)
    assert not other.record["notes"]["stored_importance_used"]
    with pytest.raises(UnmetNeed, match="stored importance"):
        unlearn(case, "ssd", stored="always")


def test_a_run_folder_hands_the_importance_to_the_next_request(tmp_path):
    case = card_case()
    first = unlearn(case, "ssd", alpha=20, floor=None, run=tmp_path / "first")
    fives = case.with_(request=requests.label(5))
    alone, handed = (unlearn(fives, "ssd", alpha=20, floor=None, state=s) for s in (None, tmp_path / "first"))
    assert handed.record["notes"]["stored_importance_used"]
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), handed.model.parameters(), strict=True))
    read_back = unlearn(case, "ssd", alpha=20, floor=None, run=tmp_path / "first")
    assert read_back.state["importance_about"] == first.state["importance_about"]
    assert all(torch.equal(t, read_back.state["importance"][n]) for n, t in first.state["importance"].items())
    assert (tmp_path / "first" / "state.safetensors").stat().st_mode & 0o077 == 0
    # a run is another one where another state is handed to it
    always = {"alpha": 20.0, "floor": None, "stored": "always", "run": tmp_path / "second"}
    second = unlearn(fives, "ssd", state=first.state, **always)
    zeros = {n: torch.zeros_like(t) for n, t in first.state["importance"].items()}
    other = unlearn(fives, "ssd", state=first.state | {"importance": zeros}, **always)
    assert second.record["weights"]["after"] != other.record["weights"]["after"]


@pytest.mark.parametrize("name", ["ssd", "lfssd"])
def test_what_is_measured_before_any_request_serves_it_to_the_same_tensors(name, tmp_path):
    case = card_case()
    before = deepcopy(case.model.state_dict())
    told: list[tuple[str, int, int]] = []
    kept = prepare(case.with_(request=requests.none()), name, run=tmp_path, report=lambda *given: told.append(given))
    assert told == [("gradients of train", 64 * i, 1000) for i in range(16)]
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())
    alone = unlearn(case, name, alpha=5, floor=None)
    for state in (kept, tmp_path):
        served = unlearn(case, name, alpha=5, floor=None, state=state)
        assert served.record["notes"]["stored_importance_used"]
        assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), served.model.parameters(), strict=True))
    with pytest.raises(BadSetting, match="grouped"):
        prepare(case, name, order="grouped")


def test_methods_that_measure_nothing_beforehand_are_told():
    with pytest.raises(UnmetNeed, match=r"one of .*ssd.*, found 'salun'"):
        prepare(card_case(), "salun")


def test_a_run_takes_the_place_of_what_an_earlier_one_kept(tmp_path):
    """Or the next request would be handed what another method, or another model, was measured by."""
    case = card_case()
    prepare(case, "ssd", run=tmp_path)
    unlearn(case, "fine_tune", epochs=1, floor=None, run=tmp_path)
    assert (tmp_path / "state.safetensors").exists()  # prepared by its owner, not by a run: it stays
    unlearn(case, "ssd", alpha=5, floor=None, run=tmp_path)
    unlearn(case, "fine_tune", epochs=1, floor=None, run=tmp_path)
    assert not (tmp_path / "state.safetensors").exists()


def test_what_a_method_needs_is_asked_before_it_measures():
    case = card_case()
    nameless = Case(case.model, TensorData(inputs=case.data.column("inputs")), requests.samples([1, 2]))
    with pytest.raises(UnmetNeed, match="ssd needs"):
        prepare(nameless, "ssd")
    assert "importance" in prepare(nameless, "lfssd")


def test_what_is_no_state_is_told(tmp_path):
    case = card_case()
    unlearn(case, "fine_tune", epochs=1, floor=None, run=tmp_path)
    with pytest.raises(UnmetNeed, match=r"no state\.safetensors"):
        unlearn(case, "ssd", state=tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(BadData, match="damaged"):
        unlearn(case, "ssd", state=tmp_path)
    with pytest.raises(BadSetting, match="found set under 'served'"):
        save_state({"served": {1, 2}}, tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == b"\0" * 40


def test_other_data_wants_an_importance_of_its_own():
    case = card_case()
    first = unlearn(case, "ssd", alpha=20, floor=None)
    fewer = case.with_(data=case.data.subset(range(900)))
    assert not unlearn(fewer, "ssd", alpha=20, floor=None, state=first.state).record["notes"]["stored_importance_used"]


def test_ssd_says_when_nothing_can_be_selected():
    case = card_case()  # 1000 rows, about 100 to forget: the limit is about 10
    with pytest.warns(ExpungeWarning, match="N/"):
        unlearn(case, "ssd", alpha=20, floor=None)
    with pytest.warns(EmptyScope, match="none of"):
        unlearn(case, "ssd", alpha=1e6, floor=None)
    # one row per batch is the per-example Fisher: nothing above N/|D_f|, as the card derives
    small = tiny()
    outcome = unlearn(small, "ssd", alpha=60 / 20, batch_size=1, floor=None)
    assert outcome.record["notes"]["selected_fraction"] == 0
    with pytest.raises(BadSetting, match="order"):
        unlearn(case, "ssd", order="random")


def test_lfssd_reads_no_labels():
    x, y, *_ = digits(200)
    models = []
    for labels in (y, (y + 1) % 10):
        torch.manual_seed(0)
        case = Case(mlp(), TensorData(inputs=x, labels=labels), requests.samples(range(20)))
        models.append(unlearn(case, "lfssd", alpha=1.5, floor=None))
    assert models[0].record["changed_fraction"] > 0
    assert all(
        torch.equal(a, b) for a, b in zip(models[0].model.parameters(), models[1].model.parameters(), strict=True)
    )


# -- Fisher ------------------------------------------------------------------------------------------------------------
def test_fisher_equals_the_slow_loop():
    case = tiny()
    bench = Workbench(case, deepcopy(case.model), 0)
    fast = own_label_fisher(bench, "retain", chunk=7)
    slow = {n: torch.zeros_like(p) for n, p in case.model.named_parameters()}
    retain = case.split("retain").ids
    for x in case.data.columns["inputs"][retain]:
        p = case.model(x[None]).softmax(1)[0].detach()
        for label in range(3):
            loss = F.cross_entropy(case.model(x[None]), torch.tensor([label]))
            grads = torch.autograd.grad(loss, list(case.model.parameters()))
            for (_n, total), g in zip(slow.items(), grads, strict=True):
                total += p[label] * g**2 / len(retain)
    for name, value in slow.items():
        assert torch.allclose(fast[name], value, atol=1e-12)


def test_noise_variance_by_hand():
    f = torch.tensor([[1.0, 1e-9], [0.25, 0.25]])
    # row 1: mean of min(1, 1e3) and min(~1e8, 1e3); row 2: 4
    assert torch.allclose(noise_variance(f, 2.0), torch.tensor([[1001.0], [8.0]]).expand(2, 2), rtol=1e-4)
    assert torch.allclose(noise_variance(f, 2.0, output_layer=True)[0], torch.tensor(101.0), rtol=1e-4)
    paper = noise_variance(f, 2.0, "paper")
    assert torch.allclose(paper, torch.tensor([[1 + 1e3**0.5], [4.0]]).expand(2, 2), rtol=1e-4)


def test_fisher_forgetting_resets_the_class_row_and_keeps_the_rest():
    case = card_case()
    outcome = unlearn(case, "fisher_forgetting", alpha=3e-6, samples=100, floor=None)
    assert accuracy(case, outcome.model, "forget") <= 1 and accuracy(case, outcome.model, "retain") >= 90
    row = outcome.model[4].weight[3]
    assert float(row.detach().std()) == pytest.approx(1e-3**0.5, rel=0.25)  # N(0, 10 * 1e-4) over 128 weights
    kept = unlearn(case, "fisher_forgetting", samples=100, class_rows=False, floor=None)
    assert accuracy(case, kept.model, "forget") > 50
    nothing = unlearn(case, "fisher_forgetting", alpha=0.0, samples=20, class_rows=False)
    assert all(torch.equal(a, b) for a, b in zip(case.model.parameters(), nothing.model.parameters(), strict=True))


# -- influence ---------------------------------------------------------------------------------------------------------
def test_woodbury_and_recursion_equal_the_dense_inverse():
    rng = torch.Generator().manual_seed(0)
    G, v, delta = torch.randn(12, 30, generator=rng).double(), torch.randn(30, generator=rng).double(), 0.03
    dense = torch.linalg.solve(G.T @ G / 12 + delta * torch.eye(30).double(), v)
    assert torch.allclose(woodbury(G, v, delta), dense, atol=1e-9)
    assert torch.allclose(woodfisher(G, v, delta), dense, atol=1e-9)
    # The official code's answer is v minus a multiple of the first gradient. The true one is not in that plane.
    plane = torch.linalg.qr(torch.stack([v, G[0]], 1)).Q
    assert float((dense - plane @ (plane.T @ dense)).norm() / dense.norm()) > 0.1


def test_influence_equals_the_dense_formula():
    case, delta, alpha = tiny(), 0.05, 0.7
    outcome = unlearn(case, "influence", damping=delta, alpha=alpha, samples=1000, floor=None)
    x, y, model = case.data.columns["inputs"], case.data.columns["labels"], deepcopy(case.model)

    def gradient(rows: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(model(x[rows]), y[rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    retain, forget = case.split("retain").ids, case.split("forget").ids
    G = torch.stack([gradient(i[None]) for i in retain])
    information = G.T @ G / len(retain) + delta * torch.eye(G.shape[1]).double()
    v = len(forget) / len(x) * (gradient(forget) - gradient(retain))
    step = alpha * torch.linalg.solve(information, v)
    before = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    after = torch.cat([p.detach().flatten() for p in outcome.model.parameters()])
    assert torch.allclose(after, before + step, atol=1e-8)


def test_influence_on_a_logistic_model_is_the_newton_step_towards_retraining():
    """Linear in its weights: the information over the model's own labels is the Hessian of the cross-entropy."""
    case = tiny(rows=120, hidden=(), forget=12)
    x, y = case.data.columns["inputs"], case.data.columns["labels"]

    def optimum(rows: torch.Tensor) -> nn.Module:
        model = deepcopy(case.model)
        solver = torch.optim.LBFGS(
            model.parameters(), max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            return loss

        solver.step(closure)
        return model

    retain = case.split("retain").ids
    case = case.with_(model=optimum(torch.arange(120)))
    retrained = optimum(retain)
    outcome = unlearn(case, "influence", fisher="model", damping=1e-6, samples=1000, floor=None)

    bench = Workbench(case, case.model, 0)
    G, count = retain_gradients(bench, 1000, "model")
    names, shapes = zip(*[(n, p.shape) for n, p in case.model.named_parameters()], strict=True)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([s.numel() for s in shapes])
        values = {n: v.view(s) for n, v, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(case.model, values, (x[retain],)), y[retain])

    flat = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    assert torch.allclose(G.T @ G / count, torch.autograd.functional.hessian(loss, flat), atol=1e-9)

    def gap(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x).softmax(1) - retrained(x).softmax(1)).norm())

    assert gap(outcome.model) < 0.2 * gap(case.model)


def test_influence_forgets_a_class_on_digits():
    case = card_case()
    outcome = unlearn(case, "influence", alpha=0.5, samples=300, floor=None)
    assert accuracy(case, outcome.model, "forget") <= 5 and accuracy(case, outcome.model, "retain") >= 85
    assert outcome.record["notes"]["parallel_to_plain_gradient"] < 0.98  # curvature was used
