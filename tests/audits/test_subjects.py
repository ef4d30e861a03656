"""Subjects: one forward for each model and split, eval mode, needs told all at once, floors and intervals."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from expunge.audits import Measured, Measurement, Subjects, check, checks, find_check, run_checks
from expunge.audits.base import GOLD_NEEDS, verify_needs
from expunge.audits.subjects import NEEDS
from expunge.cases.case import Case
from expunge.cases.data import TensorData
from expunge.cases.requests import label, none, samples, where
from expunge.errors import BadSetting, MissingGold, UnmetNeed
from expunge.records.results import Measurement as MeasurementRecord
from expunge.tasks import Classification


class Counting(nn.Module):
    """A linear classifier that counts its forward passes and the modes it ran in."""

    def __init__(self, seed=0, inputs=3, classes=3):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.drop = nn.Linear(inputs, classes), nn.Dropout(0.5)
        self.rows, self.modes = 0, set()

    def forward(self, x):
        self.rows += len(x)
        self.modes.add(self.training)
        return self.drop(self.layer(x))


def small_case(request=None, **changes):
    torch.manual_seed(0)
    data = TensorData(inputs=torch.randn(30, 3), labels=torch.arange(30) % 3)
    test = TensorData(inputs=torch.randn(20, 3), labels=torch.arange(20) % 3)
    settings = {"test": test, "build": Counting} | changes
    return Case(Counting(), data, request or samples(range(6)), **settings)


def subjects(case=None, **changes):
    models = {
        "original": Counting(1),
        "unlearned": Counting(2),
        "retrained": Counting(3),
        "floor": Counting(4),
    } | changes
    return Subjects(case or small_case(), **models, batch_size=4, resamples=20)


def test_one_forward_for_each_model_and_split_in_eval_mode_and_the_mode_comes_back():
    audit = subjects()
    model = audit.models["unlearned"].train()
    for _ in range(2):
        audit.signals("unlearned", "forget")
        audit.losses("unlearned", "forget")
        audit.predictions("unlearned", "forget")
        audit.forget_scores("unlearned")
        audit.evaluate("unlearned", "forget")
    assert model.rows == 6 and model.modes == {False} and model.training and model.drop.training
    assert audit.evaluate("unlearned", "forget")["n"] == 6


def test_a_pass_equals_the_plain_computation():
    audit = subjects()
    split, model = audit.case.split("retain"), audit.models["original"].eval()
    batch = split.data.fetch(split.ids)
    logits = model(batch["inputs"]).double()
    p = logits.softmax(-1).detach().numpy()
    np.testing.assert_allclose(audit.predictions("original", "retain"), p, atol=1e-6)
    own = p[np.arange(24), batch["labels"].numpy()]
    np.testing.assert_allclose(audit.losses("original", "retain"), -np.log(own), atol=1e-5)
    np.testing.assert_allclose(audit.forget_scores("original", "retain"), own, atol=1e-6)
    np.testing.assert_allclose(audit.signal("original", "retain", "margin"), np.log(own / (1 - own)), atol=1e-4)
    assert audit.evaluate("original", "retain")["accuracy"] == pytest.approx(
        (p.argmax(1) == batch["labels"].numpy()).mean()
    )
    assert audit.answers("retain").tolist() == batch["labels"].tolist()


@dataclass(frozen=True)
class Changing(Classification):
    """A task whose evaluation runs on other inputs than the pass did: the replay must not answer for them."""

    def evaluate(self, model, batches):
        return super().evaluate(model, (batch.with_columns(inputs=-batch["inputs"]) for batch in batches))


@dataclass(frozen=True)
class Lazy(Classification):
    """A task whose evaluation looks at the first batch only."""

    def evaluate(self, model, batches):
        return super().evaluate(model, [next(iter(batches))])


def test_the_replay_answers_only_for_the_very_batch():
    plain, changing = subjects(), subjects(small_case(task=Changing()))
    flipped = small_case().split("test")
    batch = flipped.data.fetch(flipped.ids)
    right = (plain.models["original"].eval()(-batch["inputs"]).argmax(-1) == batch["labels"]).float().mean()
    assert changing.evaluate("original", "test")["accuracy"] == pytest.approx(float(right))
    np.testing.assert_array_equal(changing.losses("original", "test"), plain.losses("original", "test"))
    lazy = subjects(small_case(task=Lazy()))
    assert lazy.evaluate("original", "retain")["n"] == 4 and len(lazy.losses("original", "retain")) == 24


def test_measured_floor_is_the_distance_of_the_second_retrained():
    audit = subjects()
    found = audit.measure(lambda subject: audit.losses(subject, "test"))
    second = audit.losses("floor", "test").mean()
    assert found.values["floor"] == pytest.approx(abs(second - found.values["retrained"]))
    assert set(found.intervals) == {"original", "unlearned", "retrained"}
    for subject, (low, high) in found.intervals.items():
        assert low < found.values[subject] < high
    assert "floor" not in subjects(floor=None).measure(lambda s: audit.losses(s, "test")).values


def test_every_unmet_need_is_told_at_once_before_any_model_runs():
    case = small_case(test=None)
    audit = subjects(case, retrained=None, floor=None)
    with pytest.raises(MissingGold) as error:
        run_checks(audit, ["ua", "ta", "weight_distance", "klom", "error"])
    text = str(error.value)
    for part in ("make_gold('retrain', case)", "Case(test=...)", "noise floor", "engine.ensemble", "regression"):
        assert part in text
    assert text.count("expected a model retrained") == 1 and "ua, ta, weight_distance" in text
    assert audit.models["unlearned"].rows == 0
    with pytest.raises(UnmetNeed) as plain:
        run_checks(subjects(case), ["ta"])
    assert not isinstance(plain.value, MissingGold)
    with pytest.raises(MissingGold, match="ua"):
        find_check("ua")(audit)


def test_needs_of_kinds_and_of_empty_requests():
    assert subjects(small_case(label(1))).unmet("kind_holdout") is None
    assert "label(c)" in subjects().unmet("kind_holdout")
    assert subjects(small_case(where("labels", ">", 0))).unmet("kind_holdout") is None
    assert "empty request" in subjects(small_case(none())).unmet("forget")
    broken = small_case(build=None)
    broken.model.extra = nn.Parameter(torch.zeros(1))
    assert "reset_parameters" in subjects(broken).unmet("untrained")


def test_unknown_names_suggest_the_nearest():
    audit = subjects()
    with pytest.raises(BadSetting, match="Did you mean 'unlearned'"):
        audit.signals("unlearnt", "forget")
    with pytest.raises(BadSetting, match="Did you mean 'margin'"):
        audit.signal("original", "forget", "margins")
    with pytest.raises(BadSetting, match="Did you mean 'klom'"):
        find_check("kloms")
    with pytest.raises(BadSetting, match="Did you mean 'signal'"):
        run_checks(audit, ["membership"], {"membership": {"signals": "loss"}})
    with pytest.raises(BadSetting, match="settings for a wanted check"):
        run_checks(audit, ["ua"], {"membership": {}})
    with pytest.raises(BadSetting, match="'retrained' as a torch"):
        subjects(retrained="weights.pt")


def test_accuracies_by_hand():
    class Says(nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label, self.nothing = label, nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.eye(3)[self.label].expand(len(x), 3) * 5 + self.nothing

    case = small_case(label(1))
    audit = subjects(case, original=Says(1), unlearned=Says(0), retrained=Says(0), floor=Says(2))
    found = {row.name: row for row in run_checks(audit, ["ua", "ra", "ta", "forgotten_class_accuracy", "utility"])}
    assert (found["ua"].original, found["ua"].unlearned, found["ua"].floor) == (0.0, 100.0, 0.0)
    assert (found["ra"].original, found["ra"].unlearned) == (0.0, 50.0)
    assert found["forgotten_class_accuracy"].original == 100.0
    assert found["ta"].unlearned == pytest.approx(100 * 7 / 13) and found["ta"].floor == pytest.approx(100 / 13)
    assert found["ua"].gap == 0 and found["ra"].intervals["unlearned"][0] < 50 < found["ra"].intervals["unlearned"][1]
    assert found["utility_retain"].unlearned == 0.5


def test_every_measurement_fits_the_record_and_the_registry_is_whole(audit):
    chosen = [name for name, item in checks("classification").items() if not any("ensemble" in n for n in item.needs)]
    chosen = [name for name in chosen if name not in ("forgotten_class_accuracy", "relearn_time", "ain")]
    own = [name for name in chosen if checks()[name].function.__module__.split(".")[-1] in OWN]
    rows = run_checks(audit, own)
    for row in rows:
        record = MeasurementRecord.model_validate(row.as_dict())
        assert record.gap == pytest.approx(row.gap) and row.floor is not None
        json.dumps(row.as_dict(extras=True))
    assert len({(row.name, row.split) for row in rows}) == len(rows)
    for item in checks().values():
        assert item.summary and item.source
        assert {need for need in item.needs if not need.startswith("probe:")} <= set(NEEDS)
    assert set(GOLD_NEEDS) <= set(NEEDS) and checks(attack=True).keys() >= {
        "membership",
        "mia_efficacy",
        "u_lira",
        "rmia",
    }
    assert "error" not in checks("classification") and "ua" not in checks("regression")


OWN = {"accuracy", "combined", "divergence", "weights", "membership_checks"}


def test_unlearned_equal_to_retrained_has_no_gap_anywhere(toy):
    perfect = Subjects(toy["case"], toy["original"], toy["retrained"], toy["retrained"], toy["floor"], resamples=20)
    names = [
        "js_divergence",
        "activation_distance",
        "zrf",
        "tow",
        "average_gap",
        "weight_difference",
        "weight_distance",
        "membership",
    ]
    for row in run_checks(perfect, names):
        assert row.gap == 0.0, row.name
    second = Subjects(toy["case"], toy["original"], toy["floor"], toy["retrained"], toy["floor"], resamples=20)
    for row in run_checks(second, ["js_divergence", "weight_distance", "average_gap"]):
        assert abs(row.gap) == pytest.approx(row.floor), row.name
        assert abs(row.original - row.retrained) > row.floor or row.split == "test" or "gap" in row.name


def test_intervals_are_cut_to_the_range_and_a_setting_reaches_its_check(audit):
    single = find_check("ua").measurement(Measured({"original": 5.0}, {"original": (-np.inf, np.inf)}))
    assert single.intervals["original"] == (0.0, 100.0) and isinstance(single, Measurement)
    loss, margin = (
        run_checks(audit, ["membership"], {"membership": {"signal": name}})[0] for name in ("loss", "margin")
    )
    assert loss.original == pytest.approx(margin.original, abs=1e-6)  # margin is monotone in the loss
    assert loss.per_example != margin.per_example


def test_corrective_accuracy_by_clean_labels(audit):
    found = {row.name: row for row in run_checks(audit, ["corrective"])}
    clean = np.asarray(audit.case.data.column("clean_labels"))[:100]
    said = audit.predictions("retrained", "forget").argmax(1)
    assert found["delete_accuracy"].retrained == pytest.approx(100 * (said == clean).mean())
    assert (
        found["delete_accuracy"].original < 20 and found["delete_error"].original < 10 < found["delete_error"].retrained
    )


def test_a_check_is_registered_once():
    with pytest.raises(BadSetting, match="choose another"):
        checks()
        check("ua")(lambda subjects: [])


def test_verify_needs_passes_when_all_is_there():
    verify_needs([find_check("ua"), find_check("zrf")], subjects())
