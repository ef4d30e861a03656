"""Search on one half of a case, and methods at one level of forgetting, on the digits."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from expunge.cases.halves import halves
from expunge.errors import BadSetting, MissingExtra
from expunge.records.matched import at_level, curve_of, matched
from expunge.records.search import Search, Trial, measure, search
from expunge.tasks import Classification
from toys import toy

SPACE = {"lr": (0.01, 0.2, "log"), "batch_size": [8, 16]}
FIXED = {"clip": 1.0, "epochs": 15}


@dataclass(frozen=True)
class Spy(Classification):
    """Writes down every row that a loss or a score is computed for."""

    seen: set = field(default_factory=set, compare=False)

    def loss(self, output, batch):
        self.seen.update(batch.ids.tolist())
        return super().loss(output, batch)

    def per_choice(self, function, output, batch, other=None, reduce="mean"):
        self.seen.update(batch.ids.tolist())
        return super().per_choice(function, output, batch, other, reduce)


def test_halves_are_disjoint_whole_and_fixed_by_the_cases_seed():
    case = toy("class").case
    one, other = halves(case)
    for name in ("forget", "retain", "holdout", "test"):
        a, b = set(one.split(name).ids.tolist()), set(other.split(name).ids.tolist())
        assert not a & b and a | b == set(case.split(name).ids.tolist()) and 0 <= len(a) - len(b) <= 1
    assert set(one.split("train").ids.tolist()) == set(one.split("forget").ids.tolist()) | set(
        one.split("retain").ids.tolist()
    )
    again = halves(case.with_(name="other"))[0]
    assert torch.equal(one.split("forget").ids, again.split("forget").ids)
    assert not torch.equal(one.split("forget").ids, halves(case.with_(seed=1))[0].split("forget").ids)
    assert "half" not in case.notes


def test_selection_never_reads_the_half_that_is_kept_back():
    spy = Spy()
    case = toy("class").case.with_(task=spy)
    selection, kept_back = halves(case)
    spy.seen.clear()
    found = search(case, "npo", SPACE, trials=2, fixed=FIXED)
    allowed = set(selection.split("train").ids.tolist())
    secret = set(kept_back.split("train").ids.tolist())
    assert spy.seen and spy.seen <= allowed and not spy.seen & secret
    spy.seen.clear()
    outcome = found.unlearn(floor=None)
    spy.seen.clear()
    found.test(outcome)
    assert spy.seen and not spy.seen & allowed


def test_the_choice_keeps_utility_and_forgets_and_holds_on_the_other_half():
    case = toy("class").case
    found = search(case, "npo", SPACE, trials=6, fixed=FIXED, least=0.9)
    assert found.chosen.kept >= 0.9 and found.chosen in found.front
    assert all(t.forget >= found.chosen.forget for t in found.done if t.kept >= 0.9)
    assert found.chosen.forget < measure(halves(case)[0], case.model)[0] - 0.3
    again = search(case, "npo", SPACE, trials=6, fixed=FIXED, least=0.9)
    assert [t.settings for t in again.trials] == [t.settings for t in found.trials]
    tested = found.test(found.unlearn(floor=None))
    assert tested["kept"] > 0.8 and tested["forget"] < measure(halves(case)[1], case.model)[0] - 0.3


def test_front_and_choice_by_hand():
    t = [
        Trial(0, {}, 0.5, 1.0),
        Trial(1, {}, 0.2, 0.98),
        Trial(2, {}, 0.3, 0.97),
        Trial(3, {}, 0.0, 0.6),
        Trial(4, {}, error="no"),
    ]
    found = Search(None, "npo", tuple(t), 0.97, 0)
    assert [x.number for x in found.front] == [3, 1, 0]
    assert found.chosen.number == 1
    assert Search(None, "npo", tuple(t[3:]), 0.97, 0).chosen.number == 3  # none keeps enough: the highest utility


def test_bad_spaces_are_told_before_any_compute():
    case = toy("class").case
    for space, fixed, match in (
        ({"lrr": (1e-3, 1e-1)}, {}, "Did you mean 'lr'"), ({"lr": (1e-1, 1e-3)}, {}, r"\(low, high\)"), ({"lr": []}, {}, "list some"),
        ({}, {}, "at least one setting"),
        ({"lr": (1e-3, 1e-1)}, {"lr": 1e-2}, "searched or fixed"),
        ({"lr": (-1.0, 0.1)}, {}, "greater than 0"),
    ):  # fmt: skip
        with pytest.raises(BadSetting, match=match):
            search(case, "npo", space, fixed=fixed)


# -- matched level -----------------------------------------------------------------------------------------------------
def test_a_level_on_a_curve_by_hand():
    """Loss 0, 2, 1, 4 at steps 0, 10, 20, 30: the level 1.5 is crossed at 7.5 first and at 21.67 for good."""
    curve = {
        s: {"forget.loss": v, "retain.accuracy": r}
        for s, v, r in zip((0, 10, 20, 30), (0.0, 2.0, 1.0, 4.0), (1.0, 0.4, 0.5, 0.8), strict=True)
    }
    reached, step, values = at_level(curve, "forget.loss", 1.5, "first")
    assert reached and step == pytest.approx(7.5) and values["retain.accuracy"] == pytest.approx(0.55)
    reached, step, values = at_level(curve, "forget.loss", 1.5)
    assert reached and step == pytest.approx(20 + 10 / 6) and values["forget.loss"] == pytest.approx(1.5)
    assert values["retain.accuracy"] == pytest.approx(0.55)
    assert at_level(curve, "forget.loss", 9.0) == (False, 30.0, curve[30])
    falling = {0: {"p": 0.9}, 1: {"p": 0.5}, 2: {"p": 0.1}, 3: {"p": 0.4}}
    assert at_level(falling, "p", 0.3, "first")[1] == pytest.approx(1.5) and not at_level(falling, "p", 0.3)[0]


def test_methods_meet_at_the_level():
    case = toy("class").case
    specs = [("npo", {"lr": 0.03, "clip": 1.0, "batch_size": 32}), ("grad_ascent", {"lr": 0.01, "batch_size": 32})]
    rows = matched(case, specs, "forget.loss", 2.0, how="stop")
    curves = matched(case, specs, "forget.loss", 2.0, crossing="first")
    for stopped, read in zip(rows, curves, strict=True):
        assert stopped.reached and read.reached
        assert stopped.values["forget.loss"] >= 2.0 and read.values["forget.loss"] == pytest.approx(2.0)
        assert stopped.step - 1 < read.step <= stopped.step
        assert curve_of(read.outcome.record["history"])[int(stopped.step)] == pytest.approx(stopped.values)
        assert toy("class").measure(stopped.outcome.model, "forget")["loss"] == pytest.approx(
            stopped.values["forget.loss"], abs=1e-6
        )
    with pytest.raises(BadSetting, match="one|curve"):
        matched(case, ["ssd"], "forget.loss", 2.0)
    with pytest.raises(BadSetting, match="crossing"):
        matched(case, specs, "forget.loss", 2.0, crossing="middle")


def test_search_without_optuna_says_how_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"expunge\[search\]"):
        search(toy("class").case, "npo", SPACE)
