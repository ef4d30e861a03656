"""SHA256: what moves, what holds it, and which epoch comes out."""

from __future__ import annotations

import functools

import pytest
import torch

from expunge import Case, Optimizer, Training, unlearn
from expunge.engine import fit
from expunge.errors import UnmetNeed
from expunge.parts.schedules import Drift
from tiny_language import language_case, llama

pytest.importorskip("transformers")
SETTINGS = {"lr": 1e-2, "epochs": 4, "batch_size": 4}


@functools.cache
def trained() -> Case:
    """Token rows known by heart: an ascent on some of them drags the others along."""
    recipe = Training(epochs=40, batch_size=12, optimizer=Optimizer("adamw", lr=1e-2))
    case = language_case(llama(3), recipe=recipe)
    return case.with_(model=fit(case, "train", 0))


def test_everything_but_the_chosen_mlps_stays_bit_for_bit():
    case = language_case(llama(3))
    outcome = unlearn(case, "sha256", floor=None, blocks=(0, 2), **SETTINGS)
    for name, before in case.model.state_dict().items():
        moved = not torch.equal(before, outcome.model.state_dict()[name])
        assert moved == (".mlp." in name and name.split(".")[2] in "02"), name
    assert outcome.record["notes"]["blocks"] == [0, 2]
    assert "mlp of blocks 0,2" in outcome.formula and "↑drift" in outcome.formula


def test_the_retain_weight_follows_the_loss_and_the_baseline_is_a_mean_over_updates():
    case = trained()
    settings = {"lr": 1e-2, "epochs": 5, "batch_size": 4, "schedule": "constant", "warmup": 0.0, "bound": None}
    outcome = unlearn(case, "sha256", floor=None, blocks=(0, 1, 2), part="block", **settings)
    history = outcome.record["history"]
    retain = [next(v for k, v in h["losses"].items() if "retain" in k) for h in history]
    weights = [next(iter(h["multipliers"].values())) for h in history]
    first = sum(h["epoch"] == 1 for h in history)
    baseline = sum(retain[:first]) / first
    assert weights[:first] == [1.2] * first
    assert weights[first:] == [Drift().of(loss - baseline) for loss in retain[first:]]
    assert max(weights) > 1.2  # the ascent on all blocks does make the retain loss drift


def test_the_epoch_with_the_lowest_bounded_joint_loss_comes_out():
    case = trained()
    wild = {"blocks": (0, 1, 2), "part": "block", "lr": 1e-2, "batch_size": 4, "schedule": "constant", "warmup": 0.0}
    outcome = unlearn(case, "sha256", floor=None, epochs=6, bound=2.0, **wild)
    chosen = outcome.record["notes"]["rewound_to_epoch"]
    assert chosen < 6  # ascent without a bound only gets worse
    values = []
    for epochs in range(1, 7):  # the slow way: a run that ends there (constant step size, so equal up to then)
        model = unlearn(case, "sha256", floor=None, epochs=epochs, bound=None, **wild).model
        forget, retain = (case.task.evaluate(model, case.split(s).batches())["loss"] for s in ("forget", "retain"))
        values.append(1.2 * retain - min(forget, 2.0))
    assert chosen == min(range(6), key=lambda e: values[e]) + 1


def test_subjects_or_blocks_must_be_given():
    case = language_case(llama(2))
    with pytest.raises(UnmetNeed, match=r"'subject'.*blocks="):
        unlearn(case, "sha256", floor=None)


def test_a_killed_run_goes_on_with_its_baseline_and_its_kept_epochs(tmp_path):
    from expunge.engine import RunDirectory, execute
    from expunge.methods import find

    case = trained()
    action = (
        find("sha256")
        .configure(blocks=(0, 1, 2), part="block", bound=2.0, lr=1e-2, epochs=4, batch_size=4)
        .action(case)
    )
    whole = execute(action, case, seed=0)
    calls = []

    class Killed(Exception):
        pass

    def kill(*_):
        calls.append(1)
        if len(calls) == 5:
            raise Killed

    with RunDirectory(tmp_path) as run, pytest.raises(Killed):
        execute(action, case, seed=0, run=run, identity="x", checkpoint_steps=1, report=kill)
    with RunDirectory(tmp_path) as run:
        rest = execute(action, case, seed=0, run=run, identity="x", checkpoint_steps=1000)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))
    assert (
        rest.trace.history == whole.trace.history and rest.notes["rewound_to_epoch"] == whole.notes["rewound_to_epoch"]
    )
