"""Golds: what each is made of, the cache, and a missing one told with its remedy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from expunge.audits import GOLDS, Subjects, golds, make_gold, run_checks
from expunge.cases.case import Case
from expunge.cases.data import TensorData
from expunge.cases.requests import samples
from expunge.errors import BadCheckpoint, BadSetting, MissingGold
from expunge.parts.plan import Optimizer, Training

RECIPE = Training(epochs=6, batch_size=16, optimizer=Optimizer("sgd", lr=0.2, momentum=0.9))


def case(recipe=RECIPE, **changes):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=rng)
    clean = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    dirty = clean.clone()
    dirty[:20] = (clean[:20] + 1) % 4
    data = TensorData(inputs=x, labels=dirty, clean_labels=clean)
    settings = {"test": TensorData(inputs=x + 10, labels=clean)} | changes
    return Case(nn.Linear(4, 4), data, samples(range(10)), recipe=recipe, **settings)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_retrain_never_sees_the_forget_rows_and_follows_its_seed():
    first = make_gold("retrain", case())
    other = case()
    other.data.columns["inputs"][:10] += 100.0  # what is forgotten must not matter
    assert same(first.model, make_gold("retrain", other).model)
    assert same(first.model, make_gold("retrain", case(), seed=0).model) and first.seconds > 0
    assert not same(first.model, make_gold("retrain", case(), seed=1).model)


def test_the_cache_gives_the_same_tensors_and_knows_what_changed(tmp_path):
    first = make_gold("retrain", case(), cache=tmp_path)
    again = make_gold("retrain", case(), cache=tmp_path)
    assert (
        not first.cached
        and again.cached
        and again.seconds == pytest.approx(first.seconds, abs=1e-3)
        and same(first.model, again.model)
    )
    changed = case()
    changed.data.columns["labels"][30] = (changed.data.columns["labels"][30] + 1) % 4
    wider = Case(nn.Linear(4, 5), case().data, samples(range(10)), recipe=RECIPE)
    others = [
        make_gold("retrain", case(), seed=1, cache=tmp_path),
        make_gold("retrain", case(Training(epochs=7, batch_size=16)), cache=tmp_path),
        make_gold("retrain", changed, cache=tmp_path),
        make_gold("retrain", case().with_(request=samples(range(11))), cache=tmp_path),
        make_gold("retrain", wider, cache=tmp_path),
        make_gold("clean_label", case(), cache=tmp_path),
        make_gold("clean_label", case(), cache=tmp_path, rows="all"),
    ]
    assert not any(gold.cached for gold in others) and len({gold.key for gold in [first, *others]}) == 8
    assert len(list(tmp_path.glob("*.safetensors"))) == 8


def test_a_truncated_cache_is_an_error_that_says_what_to_delete(tmp_path):
    first = make_gold("retrain", case(), cache=tmp_path)
    file = tmp_path / f"{first.key}.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(BadCheckpoint, match="delete this file"):
        make_gold("retrain", case(), cache=tmp_path)


def test_clean_label_equals_training_on_cleaned_rows():
    from expunge import engine

    given = case()
    labels = given.data.column("labels").clone()
    labels[:10] = given.data.column("clean_labels")[:10]
    cleaned = Case(nn.Linear(4, 4), given.data.replaced(labels=labels), samples(range(10)), recipe=RECIPE)
    assert same(make_gold("clean_label", given).model, engine.fit(cleaned, cleaned.split("train"), seed=0))
    labels[:20] = given.data.column("clean_labels")[:20]
    cleaned = Case(nn.Linear(4, 4), given.data.replaced(labels=labels), samples(range(10)), recipe=RECIPE)
    assert same(make_gold("clean_label", given, rows="all").model, engine.fit(cleaned, cleaned.split("train"), seed=0))
    assert given.data.column("labels")[0] != given.data.column("clean_labels")[0]  # the case is left alone


def test_ensemble_is_the_mean_of_the_probabilities():
    models = [nn.Linear(4, 4) for _ in range(3)]
    gold = make_gold("ensemble", case(), models=models)
    x = torch.randn(5, 4)
    expected = torch.stack([model(x).softmax(-1) for model in models]).mean(0)
    torch.testing.assert_close(gold.model(x).softmax(-1), expected)
    made = make_gold("ensemble", case(), size=2)
    assert len(made.model.models) == 2 and not same(*made.model.models)
    values = golds.MeanPrediction([nn.Linear(2, 1), nn.Linear(2, 1)], classes=False)
    z = torch.randn(3, 2)
    torch.testing.assert_close(values(z), (values.models[0](z) + values.models[1](z)) / 2)


def test_given_golds():
    model = nn.Linear(4, 4)
    assert make_gold("closed_form", case(), model=model).model is model
    gold = make_gold("residual", case(), bound={"bound": 0.01, "epsilon": 1.0, "delta": 1e-5})
    assert gold.model is None and gold.bound["bound"] == 0.01
    subjects = Subjects(case(), model, copy.deepcopy(model), gold)
    with pytest.raises(MissingGold, match="retrained"):
        run_checks(subjects, ["ua"])
    row = run_checks(
        Subjects(case(), model, model, make_gold("closed_form", case(), model=model)), ["weight_difference"]
    )[0]
    assert row.unlearned == 0.0


@pytest.mark.parametrize(
    ("kind", "changes", "settings", "remedy"),
    [
        ("retrain", {"recipe": None}, {}, "recipe=Training"),
        ("clean_label", {}, {"column": "true"}, "column=..."),
        ("ensemble", {}, {"models": []}, "models=None"),
        ("closed_form", {}, {}, "model=..."),
        ("residual", {}, {}, "bound={"),
    ],
)
def test_a_missing_gold_is_an_error_with_its_remedy(kind, changes, settings, remedy):
    with pytest.raises(MissingGold) as error:
        make_gold(kind, case(**changes), **settings)
    assert "expected" in str(error.value) and "found" in str(error.value) and remedy in str(error.value)


def test_unknown_gold_and_setting():
    with pytest.raises(BadSetting, match="Did you mean 'retrain'"):
        make_gold("retrained", case())
    with pytest.raises(BadSetting, match="colum"):
        make_gold("retrain", case(), colum="x")
    assert set(GOLDS) == {"retrain", "clean_label", "ensemble", "closed_form", "residual"}


def test_two_golds_stand_as_retrained_and_floor():
    given = case()
    model = golds.retrain(given, 5).model
    subjects = Subjects(given, model, model, make_gold("retrain", given), make_gold("retrain", given, seed=1))
    row = run_checks(subjects, ["weight_distance"])[0]
    assert row.floor == pytest.approx(1.0) and row.unlearned > 0 and np.isfinite(row.unlearned)
