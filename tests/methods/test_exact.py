"""Exact methods against the truth: a clean retrain, the closed form, the certified bound."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from expunge import Case, Optimizer, TensorData, Training, protect, requests, unlearn
from expunge.engine import fit
from expunge.errors import BadData, BadRequest, UnmetNeed
from expunge.methods.exact.acu import AnalyticModel
from expunge.methods.exact.ensemble import partition, slice_epochs
from expunge.methods.exact.protected import Trunk
from expunge.seeds import generator
from toys import digits, mlp, toy

RECIPE = Training(epochs=4, batch_size=32, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9))


def small(request=None, rows: int = 240) -> Case:
    x, y, x_test, y_test = digits(rows)
    build = lambda: mlp(64, (16,))  # noqa: E731
    return Case(build(), TensorData(inputs=x, labels=y), request or requests.samples([5]), build=build, recipe=RECIPE,
                test=TensorData(inputs=x_test, labels=y_test))  # fmt: skip


@cache
def protected(name: str, **settings) -> nn.Module:
    return protect(small(), name, seed=3, **settings)


def sharded() -> nn.Module:
    return protected("sisa", shards=5, slices=3)


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def without(ids: list[int]) -> torch.Tensor:
    keep = torch.ones(240, dtype=torch.bool)
    keep[ids] = False
    return keep.nonzero().squeeze(1)


def split_of(case: Case, ids: torch.Tensor):
    return case.split("train").subset(ids)


# -- retrain -----------------------------------------------------------------------------------------------------------
def test_retrain_equals_a_clean_retrain():
    case = small(requests.label(3))
    outcome = unlearn(case, "retrain", seed=7, prove=True)
    assert outcome.proof == {
        "kind": "proved",
        "equal_bytes": True,
        "largest_difference": 0.0,
        "relative_difference": 0.0,
    }
    assert equal(outcome.model, fit(case, "retain", 7))
    assert not equal(outcome.model, fit(case, "retain", 8))


def test_retrain_never_reads_the_forget_rows():
    case = small(requests.label(3))
    noise = case.data.column("inputs").clone()
    noise[case.split("forget").ids] = 7.0
    other = case.with_(data=case.data.replaced(inputs=noise))
    assert equal(unlearn(case, "retrain").model, unlearn(other, "retrain").model)


# -- SISA --------------------------------------------------------------------------------------------------------------
def test_sisa_ten_random_deletions_one_by_one_equal_training_from_scratch():
    model, rows = sharded(), torch.randperm(240, generator=generator(0, "deletions"))[:10].tolist()
    shares = []
    for row in rows:
        outcome = unlearn(small(requests.samples([row])).with_(model=model), "sisa")
        model = outcome.model
        shares.append(outcome.record["notes"]["share_of_training"])
        assert outcome.proof["kind"] == "proved"
    case = small().with_(model=sharded())
    assert equal(model, case.model.expunge_train(case, split_of(case, without(rows)), seed=3))
    assert max(shares) <= 1 / 5 + 0.01 and sum(shares) / len(shares) < 0.2


def test_sisa_one_request_of_ten_equals_ten_requests_and_the_proof_retrains():
    rows = torch.randperm(240, generator=generator(0, "deletions"))[:10].tolist()
    at_once = unlearn(small(requests.samples(rows)).with_(model=sharded()), "sisa", prove=True)
    assert at_once.proof["equal_bytes"] and at_once.proof["kind"] == "proved"
    model = sharded()
    for row in reversed(rows):
        model = unlearn(small(requests.samples([row])).with_(model=model), "sisa").model
    assert equal(model, at_once.model)


def test_sisa_retrains_only_what_has_seen_the_row():
    original = sharded()
    layout = original.partition
    row = int(((layout.shard == 2) & (layout.slice == 1)).nonzero()[0])
    after = unlearn(small(requests.samples([row])).with_(model=original), "sisa")
    assert after.record["notes"]["slices_retrained"] == 2  # slices 1 and 2 of shard 2
    for s in range(5):
        assert equal(original.members[s], after.model.members[s]) == (s != 2)
        for r in range(4):  # snapshot r + 1 is the first to have seen slice r
            assert equal(original.snapshots[s][r], after.model.snapshots[s][r]) == (s != 2 or r <= 1)
    assert original.rows.live[row] and not after.model.rows.live[row] and not after.model.rows.digests[row].any()


def test_sisa_prediction_is_the_mean_probability_and_the_gold_is_the_ensemble():
    case = small().with_(model=sharded())
    x = case.test.column("inputs")[:50]
    mean = torch.stack([member(x).softmax(1) for member in sharded().members]).mean(0)
    assert torch.allclose(sharded()(x).softmax(1), mean, atol=1e-6) and torch.allclose(
        sharded()(x).exp(), mean, atol=1e-6
    )
    gold = fit(case, "retain", 9)
    assert type(gold) is type(sharded()) and not gold.rows.live[5] and gold.rows.live.sum() == 239


def test_sisa_blanked_rows_are_fine_and_dropped_or_changed_ones_are_refused():
    model = unlearn(small(requests.samples([5])).with_(model=sharded()), "sisa").model
    x, y = small().data.column("inputs").clone(), small().data.column("labels")
    x[5] = 0
    blanked = small(requests.samples([9])).with_(model=model, data=TensorData(inputs=x, labels=y))
    assert unlearn(blanked, "sisa", prove=True).proof["equal_bytes"]
    with pytest.raises(BadRequest, match="already forgotten"):
        unlearn(small(requests.samples([5])).with_(model=model), "sisa")
    with pytest.raises(BadData, match="239 rows"):
        unlearn(blanked.with_(data=TensorData(inputs=x[:-1], labels=y[:-1])), "sisa")
    x[17] += 1
    with pytest.raises(BadData, match=r"other content \(first: \[17\]\)"):
        unlearn(blanked.with_(data=TensorData(inputs=x, labels=y)), "sisa")


def test_sisa_layout_and_epochs():
    data = TensorData(inputs=torch.randn(60, 2), likely=torch.arange(60.0))
    layout = partition(data, 3, 4, seed=0, likely="likely")
    assert layout.shard.bincount().tolist() == [20] * 3 and layout.slice.bincount().tolist() == [15] * 4
    assert set(layout.shard[40:].tolist()) == {2} and set(layout.slice[55:].tolist()) == {3}
    assert slice_epochs(12, 3) == [6, 6, 6] and slice_epochs(1, 3) == [1, 1, 1] and slice_epochs(5, 1) == [5]
    assert slice_epochs(10, 3) == [5, 5, 5] and slice_epochs(9, 3) == [4, 5, 4]  # a = 4.5: 4, 9-4, 13-9


def test_sisa_values_are_averaged_for_regression():
    case = toy("regression").case.with_(recipe=Training(epochs=3, batch_size=32, optimizer=Optimizer("adam", lr=3e-3)))
    model = protect(case, "sisa", shards=2, slices=2)
    x = case.test.column("inputs")
    assert torch.allclose(model(x), (model.members[0](x) + model.members[1](x)) / 2)
    assert unlearn(case.with_(model=model), "sisa", prove=True).proof["equal_bytes"]


def test_a_run_directory_brings_back_a_protected_model(tmp_path):
    case = small(requests.samples([5, 6])).with_(model=sharded())
    first = unlearn(case, "sisa", run=tmp_path / "run")
    again = unlearn(case, "sisa", run=tmp_path / "run")
    assert equal(first.model, again.model) and again.proof == first.proof
    onward = unlearn(small(requests.samples([7])).with_(model=again.model), "sisa", prove=True)
    assert onward.proof["equal_bytes"]


# -- ACU ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings", [{"form": "statistics"}, {"form": "recursive"}, {"backbone": "model", "width": 100}]
)
def test_acu_ten_requests_equal_the_closed_form_and_a_new_head(settings):
    model = original = protected("acu", **{"width": 300, **settings})
    rows = torch.randperm(240, generator=generator(1, "deletions"))[:20].tolist()
    for start in range(0, 20, 2):
        outcome = unlearn(small(requests.samples(rows[start : start + 2])).with_(model=model), "acu")
        assert outcome.proof["kind"] == "proved" and outcome.proof["relative_difference"] < 1e-5
        assert outcome.proof["scope"] == ("head" if "backbone" in settings else "all")
        model = outcome.model
    case = small()
    clean = original.expunge_train(case, split_of(case, without(rows)), seed=3)
    x = case.test.column("inputs")
    assert torch.allclose(model.head.W, clean.head.W, rtol=0, atol=1e-5 * float(clean.head.W.abs().max()))
    assert torch.equal(model(x).argmax(1), clean(x).argmax(1)) and model.head.live == 220 == outcome.proof["rows"]
    assert not torch.allclose(model.head.W, original.head.W)


def test_acu_forgets_a_class_whatever_order_classes_came_in():
    case = small(requests.label(3))
    x, y = case.data.column("inputs"), case.data.column("labels")
    order = y.argsort(descending=True)  # the first block then holds the last classes only
    model = AnalyticModel(None, 64, 10, width=300).learn_stream([(x[rows], y[rows]) for rows in order.split(60)])
    assert model.head.classes.tolist() != list(range(10))
    before = case.task.evaluate(model, case.split("test").batches())["accuracy"]
    outcome = unlearn(case.with_(model=model), "acu")
    assert before > 0.85 and outcome.proof["kind"] == "proved"
    x = case.test.column("inputs")
    assert outcome.model(x).shape == (len(x), 10) and not (outcome.model(x).argmax(1) == 3).any()
    assert case.task.evaluate(outcome.model, case.split("test").batches())["accuracy"] >= before - 0.02


def test_acu_refuses_what_it_does_not_hold():
    model = unlearn(small(requests.samples([5])).with_(model=protected("acu", width=300)), "acu").model
    with pytest.raises(BadRequest, match="never learned or are already forgotten"):
        unlearn(small(requests.samples([5])).with_(model=model), "acu")


def test_acu_regression():
    case = toy("regression").case
    model = protect(case, "acu", width=100, ridge=1.0)
    assert case.task.evaluate(model, case.split("train").batches())["r2"] > 0.4
    outcome = unlearn(case.with_(model=model), "acu")
    assert outcome.proof["kind"] == "proved" and outcome.proof["rows"] == len(case.split("retain"))


# -- certified removal -------------------------------------------------------------------------------------------------
@cache
def cancer() -> Case:
    from expunge.cases.datasets import breast_cancer

    data = breast_cancer(400)
    return Case(data.build(), data.train, requests.samples([0]), test=data.test, build=data.build, recipe=RECIPE)


def test_certified_removal_stays_within_its_bound_at_every_step():
    model = protect(cancer(), "certified_removal", lam=3e-2)
    before = cancer().task.evaluate(model, cancer().split("test").batches())["accuracy"]
    for row in range(50):
        outcome = unlearn(cancer().with_(model=model, request=requests.samples([row])), "certified_removal")
        proof, model = outcome.proof, outcome.model
        assert proof["kind"] == "bounded" and 0 < proof["residual"] <= proof["bound"] * (1 + 1e-9) <= proof["budget"]
    assert proof["removals"] == 50 and proof["trainings"] == 1 and proof["bound"] > 1e-3
    assert cancer().task.evaluate(model, cancer().split("test").batches())["accuracy"] >= before - 0.02 > 0.85
    case = cancer().with_(model=model, request=requests.samples(list(range(50))))
    assert len(case.split("retain")) == int(model.rows.live.sum())


def test_certified_removal_retrains_when_the_budget_is_spent():
    model = protect(cancer(), "certified_removal", lam=1e-3)
    outcome = unlearn(cancer().with_(model=model, request=requests.samples(range(120))), "certified_removal")
    assert outcome.record["notes"]["retrained"] and outcome.proof["trainings"] == 2
    assert not torch.equal(outcome.model.head.perturbation, model.head.perturbation)
    refusing = protect(cancer(), "certified_removal", lam=1e-3, when_spent="refuse")
    with pytest.raises(UnmetNeed, match="budget"):
        unlearn(cancer().with_(model=refusing, request=requests.samples(range(120))), "certified_removal")


# -- all protected models ----------------------------------------------------------------------------------------------
PROTECTED = [("sisa", {"shards": 5, "slices": 3}), ("acu", {"width": 300}), ("certified_removal", {})]


@pytest.mark.parametrize(("name", "settings"), PROTECTED)
def test_protected_models_copy_keep_their_keys_and_know_their_method(name, settings):
    model = protected(name, **settings)
    assert model.expunge_protection == name and equal(copy.deepcopy(model), model)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    outcome = unlearn(small().with_(model=model), name)
    assert outcome.model.state_dict().keys() == kept.keys() and type(outcome.model) is type(model)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items()), "the original was changed"
    assert 0 < outcome.record["changed_fraction"] < 1 and not outcome.warnings
    other = "acu" if name == "sisa" else "sisa"
    with pytest.raises(UnmetNeed, match=other):
        unlearn(small().with_(model=model), other)
    with pytest.raises(UnmetNeed, match="protect"):
        unlearn(small(), name)


def test_trunk_takes_off_the_last_linear_layer():
    model = mlp(64, (16,))
    x = torch.randn(3, 64)
    trunk = Trunk(model, 10)
    assert torch.allclose(model[2](trunk(x)), model(x)) and not any(p.requires_grad for p in trunk.parameters())
    with pytest.raises(Exception, match="end in a linear layer with 7 outputs"):
        Trunk(model, 7)
