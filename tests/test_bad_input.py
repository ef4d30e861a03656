"""Bad input and faults: each ends in one clear error or in the very tensors of an undisturbed run, never in silence."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from expunge import Case, Optimizer, Plan, TensorData, Term, Training, requests, unlearn
from expunge.engine import RunDirectory, fit
from expunge.errors import (
    BadCheckpoint,
    BadData,
    BadModel,
    BadRequest,
    BadSetting,
    ChangedNothing,
    CollapsedUtility,
    DiskFull,
    Diverged,
    RunBusy,
    UnmetNeed,
)
from expunge.parts.adversaries import average
from expunge.parts.objectives import ascend, npo
from expunge.parts.objectives import fit as keep
from expunge.parts.scopes import salient
from toys import digits, mlp

RECIPE = Training(epochs=6, batch_size=32, optimizer=Optimizer("sgd", lr=0.1, momentum=0.9))
SOURCE = str(Path(__file__).resolve().parents[1] / "src")
HERE = str(Path(__file__).resolve().parent)


def build() -> nn.Module:
    return mlp(64, (24,))


@cache
def trained() -> nn.Module:
    return fit(made(requests.label(3), model=build()), "train", 0)


def made(request, model=None, rows: int = 300, **changes) -> Case:
    x, y, x_test, y_test = digits(rows)
    columns = {"data": TensorData(inputs=x, labels=y), "test": TensorData(inputs=x_test, labels=y_test)} | changes
    return Case(model if model is not None else trained(), request=request, recipe=RECIPE, build=build, **columns)


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def plan(epochs: int = 4) -> Plan:
    """Two phases with momentum, Adam, a saliency mask and an average: everything a checkpoint must carry."""
    first = Plan(
        Term(npo(0.5)), Term(keep(), on="retain"), optimizer=Optimizer("sgd", lr=0.02, momentum=0.9), epochs=epochs
    )
    second = Plan(Term(keep(), on="retain"), scope=salient(0.5), optimizer=Optimizer("adam", lr=1e-3), epochs=epochs,
                  average=average(0.5))  # fmt: skip
    return Plan(phases=(first, second))


# -- requests and data -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (requests.samples([5, 300]), r"0\.\.299, found 1 outside \(first: \[300\]\)"),
        (requests.samples([-1]), "outside"),
        (requests.samples([5, 6, 5]), r"named more than once \(first: \[5\]\)"),
        (requests.samples([]), "found none"),
        (requests.label(11), "labels == 11, found none"),
        (requests.samples(range(300)), "takes all 300 rows"),
        (requests.where("labels", ">=", 0), "takes all 300 rows"),
    ],
)
def test_requests_that_do_not_fit_the_data(request_, said):
    with pytest.raises(BadRequest, match=said):
        made(request_)


def test_a_misspelt_request_suggests_the_right_word():
    with pytest.raises(BadRequest, match="Did you mean 'samples'"):
        made({"sample": [1]})
    with pytest.raises(BadRequest, match="operator"):
        requests.where("labels", "=", 3)


def test_holdout_that_overlaps_the_training_data():
    x, y, *_ = digits(300)
    with pytest.raises(BadData, match="holdout data that the model never saw, found 2 rows"):
        made(requests.label(3), holdout=TensorData(inputs=x[[3, 9]], labels=y[[3, 9]]))
    with pytest.raises(BadData, match="test data that the model never saw"):
        made(requests.label(3), test=TensorData(inputs=x[:40], labels=y[:40]))


def test_labels_outside_the_range_of_the_model():
    x, y, *_ = digits(300)
    for wrong in (10, -1):
        labels = y.clone()
        labels[137] = wrong
        with pytest.raises(BadData, match=r"labels in 0\.\.9 \(the model has 10 outputs\)"):
            made(requests.label(3), data=TensorData(inputs=x, labels=labels))
    with pytest.raises(BadData, match="int64 class numbers"):
        made(requests.samples([1]), data=TensorData(inputs=x, labels=y.float()))


def test_nan_in_the_data_names_the_rows():
    x, y, *_ = digits(300)
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[41, 7] = value
        with pytest.raises(BadData, match=r"training data, found NaN or infinity in 1 rows \(first: \[41\]\)"):
            made(requests.label(3), data=TensorData(inputs=bad, labels=y))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(63, 10), "run on inputs"),
        (nn.Sequential(nn.Linear(64, 10), nn.Unflatten(1, (2, 5))), "expected logits of shape"),
        (nn.Linear(64, 1), "classes >= 2"),
    ],
)
def test_a_model_whose_output_does_not_fit_the_task(model, said):
    with pytest.raises(BadModel, match=said):
        made(requests.label(3), model=model)


def test_what_is_no_model_and_columns_of_other_names():
    with pytest.raises(BadModel, match=r"torch\.nn\.Module"):
        made(requests.label(3), model="resnet")
    x, y, *_ = digits(300)
    with pytest.raises(BadData, match="column 'inputs'"):
        made(requests.samples([1]), data=TensorData(pictures=x, labels=y), test=None)
    with pytest.raises(BadData, match="one length"):
        TensorData(inputs=x, labels=y[:-1])


# -- settings ----------------------------------------------------------------------------------------------------------
def test_unknown_names_suggest_the_nearest():
    case = made(requests.label(3))
    with pytest.raises(BadSetting, match="Did you mean 'density'"):
        unlearn(case, "salun", densty=0.5)
    with pytest.raises(BadSetting, match="Did you mean 'salun'"):
        unlearn(case, "sa_lun")
    with pytest.raises(BadSetting, match=r"salun\.density.*less than or equal to 1.*found 1\.5"):
        unlearn(case, "salun", density=1.5)
    with pytest.raises(BadSetting, match="Did you mean 'classification'"):
        made(requests.label(3), task="clasification")


def test_everything_that_is_missing_is_said_before_any_compute():
    case = Case(trained(), made(requests.label(3)).data, requests.label(3))
    with pytest.raises(UnmetNeed, match="recipe"):
        unlearn(case, "retrain")


# -- models that change too little or too much -------------------------------------------------------------------------
def test_a_method_that_changes_nothing_warns_and_says_so_in_the_record():
    frozen = Plan(Term(keep(), on="retain"), optimizer=Optimizer("sgd", lr=0.0), epochs=1)
    with pytest.warns(ChangedNothing):
        outcome = unlearn(made(requests.label(3)), frozen)
    assert equal(outcome.model, trained()) and any("ChangedNothing" in w for w in outcome.warnings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ChangedNothing)
        unlearn(made(requests.none()), frozen)  # nothing was asked for


def test_a_destroyed_model_is_caught_by_the_floor_and_restored():
    case = made(requests.label(3))
    destroy = Plan(Term(ascend()), optimizer=Optimizer("sgd", lr=2.0), epochs=3)
    with pytest.warns(CollapsedUtility):
        outcome = unlearn(case, destroy, floor=0.5)
    retain = lambda m: case.task.evaluate(m, case.split("retain").batches())["accuracy"]  # noqa: E731
    assert outcome.record["restored"] and "below the floor" in outcome.record["ended"]
    assert retain(outcome.model) == retain(trained()) and any("CollapsedUtility" in w for w in outcome.warnings)
    wrecked = unlearn(case, destroy, floor=None)
    assert retain(wrecked.model) < 0.5 * retain(trained()) and not wrecked.record["restored"]


def test_the_best_earlier_state_comes_back_not_just_the_original():
    case = made(requests.label(3))
    rising = Plan(
        Term(ascend()), Term(keep(), on="retain", weight=0.2), optimizer=Optimizer("sgd", lr=0.005), epochs=60
    )
    outcome = unlearn(case, rising, floor=0.9)
    accuracy = lambda s: case.task.evaluate(outcome.model, case.split(s).batches())["accuracy"]  # noqa: E731
    before = case.task.evaluate(trained(), case.split("retain").batches())["accuracy"]
    assert outcome.record["restored"] and not equal(outcome.model, trained()) and accuracy("retain") >= 0.9 * before


def test_a_loss_that_becomes_nan_ends_the_run_at_the_last_good_state():
    with pytest.warns(Diverged):
        outcome = unlearn(
            made(requests.label(3)), Plan(Term(ascend()), optimizer=Optimizer("sgd", lr=1e30), epochs=3, batch_size=4)
        )
    assert all(bool(torch.isfinite(v).all()) for v in outcome.model.state_dict().values())


# -- runs that are disturbed -------------------------------------------------------------------------------------------
class Killed(Exception):
    pass


def interrupted(case: Case, folder: Path, after: int, **more) -> None:
    """A run that dies (without any cleaning up of its files) after so many updates."""
    count = 0

    def die(*_: object) -> None:
        nonlocal count
        count += 1
        if count >= after:
            raise Killed

    with pytest.raises(Killed):
        unlearn(case, plan(), run=folder, seed=5, checkpoint_steps=1, report=die, **more)


@cache
def undisturbed():
    return unlearn(made(requests.label(3)), plan(), seed=5)


@pytest.mark.parametrize("after", [1, 5, 6, 13, 20, 21, 24, 33, 40])
def test_a_run_that_dies_at_any_update_resumes_to_the_same_tensors(after, tmp_path):
    case, whole = made(requests.label(3)), undisturbed()
    interrupted(case, tmp_path, after)
    resumed = unlearn(case, plan(), run=tmp_path, seed=5, checkpoint_steps=1)
    assert equal(resumed.model, whole.model) and not equal(whole.model, trained())
    assert resumed.record["history"] == whole.record["history"] and resumed.record["updates"] == whole.record["updates"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(whole.record["history"])
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_process_killed_at_a_random_moment_resumes_to_the_same_tensors(tmp_path):
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path[:0] = [{SOURCE!r}, {HERE!r}]
        import test_bad_input as t
        case = t.made(t.requests.label(3))
        print("ready", flush=True)
        t.unlearn(case, t.plan(), run={str(tmp_path / "run")!r}, seed=5, checkpoint_steps=1,
                  report=lambda *_: time.sleep(0.02))
        """
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    while not checkpoint.exists() and child.poll() is None:
        time.sleep(0.005)
    time.sleep(0.1 + 0.6 * (os.getpid() % 100) / 100)
    with pytest.raises(RunBusy, match=str(child.pid)):  # it holds the directory as long as it lives
        RunDirectory(tmp_path / "run").__enter__()
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and checkpoint.exists()
    resumed = unlearn(made(requests.label(3)), plan(), run=tmp_path / "run", seed=5, checkpoint_steps=1)
    assert equal(resumed.model, undisturbed().model) and resumed.record["history"] == undisturbed().record["history"]


def test_two_in_one_run_directory(tmp_path):
    with RunDirectory(tmp_path) as _, pytest.raises(RunBusy, match=f"process {os.getpid()} working in it"):
        unlearn(made(requests.label(3)), plan(), run=tmp_path)
    assert unlearn(made(requests.label(3)), "fine_tune", epochs=1, run=tmp_path).model is not None


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    case = made(requests.label(3))
    interrupted(case, tmp_path, 20)
    file = tmp_path / "checkpoint.safetensors"
    whole = file.read_bytes()
    go = lambda **more: unlearn(case, plan(), run=tmp_path, **{"seed": 5, **more})  # noqa: E731
    for wrong in (b"", whole[:4], whole[: len(whole) // 2], whole[:-1], os.urandom(1000), pickle.dumps({"a": 1})):
        file.write_bytes(wrong)
        with pytest.raises(BadCheckpoint, match="delete checkpoint.safetensors"):
            go()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    file.write_bytes(bytes(flipped))
    with pytest.raises(BadCheckpoint, match="digest"):
        go()
    file.write_bytes(whole)
    with pytest.raises(BadCheckpoint, match="one of another"):
        go(seed=6)
    assert equal(go().model, undisturbed().model)


def test_a_damaged_outcome_is_made_again(tmp_path):
    case = made(requests.label(3))
    first = unlearn(case, "fine_tune", epochs=1, run=tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BadModel, match="whole safetensors"):
        unlearn(case, "fine_tune", epochs=1, run=tmp_path)
    weights.unlink()
    assert equal(unlearn(case, "fine_tune", epochs=1, run=tmp_path).model, first.model)


@pytest.mark.parametrize("after", [1, 8, 20])
def test_a_full_disk_leaves_what_was_there_and_the_run_goes_on_later(after, tmp_path, monkeypatch):
    import expunge.files as files

    case, real, count = made(requests.label(3)), os.write, 0

    def full(handle: int, content) -> int:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, content)

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(DiskFull, match="disk is full"):
        unlearn(case, plan(), run=tmp_path, seed=5, checkpoint_steps=1)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.part"))
    resumed = unlearn(case, plan(), run=tmp_path, seed=5, checkpoint_steps=1)
    assert equal(resumed.model, undisturbed().model)


def test_a_full_disk_under_the_metrics_is_said_too(tmp_path):
    class Full:
        def write(self, _: str) -> None:
            raise OSError(errno.ENOSPC, "no space")

        close = write_all = lambda self: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space"))

    with pytest.raises(DiskFull, match=r"metrics\.jsonl"), RunDirectory(tmp_path) as run:
        run._metrics = Full()
        run.log({"step": 1})
    with RunDirectory(tmp_path):
        pass  # the lock was given back


# -- privacy -----------------------------------------------------------------------------------------------------------
def test_forgotten_examples_never_reach_the_run_directory(tmp_path, capfd):
    from expunge.cases.data import MapData

    x, y, x_test, y_test = digits(120)
    x = x.clone()
    x[7] = torch.tensor([0.123456789, 0.987654321]).repeat(32)
    names = [f"Zebulon-{i:04d}" for i in range(120)]
    rows = [{"inputs": x[i], "labels": int(y[i]), "person": names[i]} for i in range(120)]
    case = Case(build(), MapData(rows), requests.samples([7, 8, 9]), test=TensorData(inputs=x_test, labels=y_test),
                recipe=Training(epochs=2), build=build)  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = unlearn(case, "salun", epochs=2, run=tmp_path, checkpoint_steps=1)
    unlearn(case, "retrain", run=tmp_path / "retrain")
    printed = "".join([*capfd.readouterr(), *(str(w.message) for w in caught), repr(outcome.record)])
    content = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()) + printed.encode()
    pattern = x[7].numpy().tobytes()
    assert len(content) > 1000 and str(case.describe()["data"]["fingerprint"]).encode() in content
    assert b"Zebulon" not in content and pattern[:8] not in content
    assert b"0.12345" not in content and b"0.98765" not in content and b"[7, 8, 9]" not in content
