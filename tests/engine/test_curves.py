"""Curves while a method runs, and the stop at a stated level, on a real classifier."""

from __future__ import annotations

import json

import pytest
import torch

from expunge import Curves, Optimizer, Plan, Term, unlearn
from expunge.errors import BadSetting
from expunge.parts import ascend, fit, reaches, steps
from toys import toy

PLAN = Plan(Term(ascend(6.0), "forget"), Term(fit(), "retain"), optimizer=Optimizer("sgd", lr=0.02), epochs=6,
            batch_size=32, epoch_of="forget")  # fmt: skip
CURVES = Curves(3, ("forget.loss", "forget.accuracy", "retain.utility"))


def measured(outcome):
    return {h["step"]: h["measured"] for h in outcome.record["history"] if "measured" in h}


def test_a_curve_is_what_a_run_that_ends_there_measures():
    t = toy("class")
    found = measured(unlearn(t.case, PLAN, floor=None, curves=CURVES))
    last = max(found)
    assert sorted(found) == list(range(0, last + 1, 3))
    assert found[0]["forget.loss"] == pytest.approx(t.measure(t.original, "forget")["loss"], abs=1e-6)
    ended = unlearn(t.case, PLAN.with_(stop=steps(6)), floor=None)
    assert found[6]["forget.loss"] == pytest.approx(t.measure(ended.model, "forget")["loss"], abs=1e-6)
    assert found[6]["forget.accuracy"] == pytest.approx(t.measure(ended.model, "forget")["accuracy"])
    assert found[6]["retain.utility"] == pytest.approx(t.measure(ended.model, "retain")["accuracy"])


def test_looking_changes_nothing():
    t = toy("class")
    bare, seen = unlearn(t.case, PLAN, floor=None), unlearn(t.case, PLAN, floor=None, curves=CURVES)
    assert bare.record["weights"]["after"] == seen.record["weights"]["after"]
    assert bare.record["updates"] == seen.record["updates"]


def test_curves_are_in_the_log_and_survive_a_kill(tmp_path):
    from expunge.engine import RunDirectory, execute

    t = toy("class")
    whole = unlearn(t.case, PLAN, floor=None, curves=CURVES, run=tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {h["step"]: h["measured"] for h in lines if "measured" in h} == measured(whole)
    calls = []

    def kill(*_):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt

    with RunDirectory(tmp_path / "cut") as run, pytest.raises(KeyboardInterrupt):
        execute(PLAN, t.case, run=run, identity="x", checkpoint_steps=2, report=kill, curves=CURVES)
    with RunDirectory(tmp_path / "cut") as run:
        rest = execute(PLAN, t.case, run=run, identity="x", checkpoint_steps=2, curves=CURVES)
    assert rest.trace.history == whole.record["history"]


@pytest.mark.parametrize(("value", "key"), [(1.5, "loss"), (0.5, "accuracy")])
def test_the_run_ends_at_the_stated_level(value, key):
    """Losses rise to the level and accuracies fall to it; one update earlier the level was not reached."""
    t = toy("class")
    outcome = unlearn(t.case, PLAN, floor=None, stop=reaches(value, key, every=1))
    end = outcome.record["updates"]
    assert f"forget {key}" in outcome.record["ended"] and 1 < end < 100
    sign = 1 if key == "loss" else -1
    assert sign * (t.measure(outcome.model, "forget")[key] - value) >= 0
    before = unlearn(t.case, PLAN.with_(stop=steps(end - 1)), floor=None)
    assert sign * (t.measure(before.model, "forget")[key] - value) < 0
    assert str(reaches(value, key)) == f"forget {key} reaches {value:g}"


def test_bad_names_say_what_to_do():
    with pytest.raises(BadSetting, match="forget.loss or retain.utility"):
        Curves(5, ("loss",))
    with pytest.raises(BadSetting, match="many steps"):
        unlearn(toy("class").case, "ssd", stop=reaches(1.0))


def test_share_of_steps_starts_the_average():
    """0.8 of 125 updates, every 5: the six snapshots of the published setting."""
    from expunge.parts import average

    takes = [step for step in range(1, 126) if average(0.8, 5).takes(step, 125)]
    assert takes == [100, 105, 110, 115, 120, 125] == [s for s in range(1, 126) if average(100, 5).takes(s, 125)]
    with pytest.raises(BadSetting, match="every >= 1"):
        average(0, 0)


def test_weights_come_out_averaged_from_a_share_on():
    from expunge.parts import average

    t = toy("class")
    plan = PLAN.with_(epochs=3)
    total = unlearn(t.case, plan, floor=None).record["updates"]
    ends = [unlearn(t.case, plan.with_(stop=steps(k)), floor=None).model.state_dict() for k in range(1, total + 1)]
    from_half = [
        s
        for k, s in enumerate(ends, 1)
        if k >= -(-total // 2) and (k + (total // 2)) % 2 == (-(-total // 2) + total // 2) % 2
    ]
    out = unlearn(t.case, plan.with_(average=average(0.5, 2)), floor=None).model.state_dict()
    for key, value in out.items():
        assert torch.allclose(value, torch.stack([s[key] for s in from_half]).mean(0), atol=1e-6)
