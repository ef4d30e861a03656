"""Faults of a language method's run: killed by the system, out of numbers, out of memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from expunge import unlearn
from expunge.errors import OutOfMemory
from tiny_language import language_case

SETTINGS = dict(lr=3e-3, epochs=6, batch_size=2, optimizer="adamw", seed=5, floor=None, checkpoint_steps=1)
SCRIPT = """
import sys, time
sys.path[:0] = [{here!r}, {tests!r}]
import test_language_faults as t
print("ready", flush=True)
t.unlearn(t.language_case(), "npo", run={run!r}, report=lambda *_: time.sleep(0.1), **t.SETTINGS)
"""


def test_a_killed_process_goes_on_to_the_same_tensors(tmp_path):
    here = Path(__file__).parent
    script = SCRIPT.format(here=str(here), tests=str(here.parent), run=str(tmp_path / "run"))
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    while not checkpoint.exists() and child.poll() is None:
        time.sleep(0.005)
    time.sleep(0.25)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and checkpoint.exists()
    whole = unlearn(language_case(), "npo", **SETTINGS)
    resumed = unlearn(language_case(), "npo", run=tmp_path / "run", **SETTINGS)
    assert resumed.record["history"] == whole.record["history"]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_an_ascent_to_nan_is_rolled_back_and_says_so():
    case = language_case()
    outcome = unlearn(
        case, "grad_ascent", lr=1e30, epochs=4, batch_size=2, optimizer="sgd", clip=None, warmup=0.0, seed=0
    )
    assert "became nan at step 2" in outcome.record["ended"]
    for name, value in case.model.state_dict().items():  # the last whole epoch's state: none was done
        assert torch.equal(value, outcome.model.state_dict()[name]), name


def test_memory_that_ends_within_a_language_method_names_the_knobs(monkeypatch):
    from expunge.tasks.language import Language

    def greedy(*_, **__):
        torch.empty(2**60, dtype=torch.uint8)

    case = language_case()
    monkeypatch.setattr(Language, "forward", greedy)
    with pytest.raises(OutOfMemory) as told:
        unlearn(case, "grad_diff", **SETTINGS)
    for knob in ("chunk", "gradient_checkpointing", "batch_size below 2", "low_rank"):
        assert knob in str(told.value)
