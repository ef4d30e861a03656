"""A GAN case from a file: own samples judged by one function, scored by another, and back to weights of the same pair."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gan_ring
from command_line import command, written
from gan_ring import FORGET, build, real_case, ring, shares

RECIPE = {"epochs": 40, "batch_size": 64, "optimizer": {"name": "adam", "lr": 0.002, "betas": [0.0, 0.99]}}


@pytest.fixture
def case_file(tmp_path, monkeypatch):
    save_file(real_case().model.state_dict(), tmp_path / "pair.safetensors")
    (tmp_path / "ring_model.py").write_text(inspect.getsource(gan_ring))
    x, y = ring(256, 1)
    np.savez(tmp_path / "real.npz", inputs=x.numpy(), labels=y.numpy())
    content = {
        "name": "ring", "task": "gan", "model": {"factory": "ring_model:build", "weights": "pair.safetensors"},
        "data": {"judge": "ring_model:judge", "samples": 400}, "test": "real.npz", "request": {"label": FORGET},
        "recipe": RECIPE, "floor": None, "audit": {"judge": "ring_model:chances", "attacks": False},
        "method": {"name": "adapt_then_unlearn", "steps": 60, "adapt_steps": 40, "copies": 1, "ewc": 1.0, "r1": 1.0, "alpha": 300.0,
                   "gamma": 0.05, "batch_size": 32, "lr": 0.001, "half_life": 600},
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return written(tmp_path, content)


def test_a_run_ends_in_weights_of_the_same_pair_and_an_audit_by_another_judge(case_file, tmp_path):
    assert "valid" in command("validate", case_file)
    command("run", case_file, "--out", tmp_path / "run")
    pair = build()
    pair.load_state_dict(load_file(tmp_path / "run" / "model" / "model.safetensors"))
    assert float(shares(pair)[FORGET]) < 0.7 * float(shares(real_case().model)[FORGET])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    by_name = {m["name"]: m for m in results["measurements"]}
    assert by_name["pul"]["original"] == 0 < by_name["pul"]["unlearned"] <= 100
    assert {"sample_diversity", "least_share", "fid", "ret_fid"} <= set(by_name)
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    told = outcome["record"]["case"]["notes"]["feedback"]
    assert told["samples"] == 400 and told["negatives"] + told["positives"] == 400 and len(told["judge"]) == 64


def test_one_judge_for_both_is_refused_and_a_judge_needs_a_gan(case_file):
    shown = command("run", case_file, "audit.judge=ring_model:judge", "--out", "other", code=2)
    assert "train a second one" in " ".join(shown.split())
    shown = command("validate", case_file, "task=classification", code=2)
    assert "expected task: gan" in " ".join(shown.split())


def test_the_pair_read_from_a_file_is_the_one_that_was_saved(case_file):
    from expunge.cli.build import build_case
    from expunge.cli.config import read_case

    case = build_case(read_case(case_file))
    assert all(torch.equal(a, b) for a, b in zip(case.model.parameters(), real_case().model.parameters(), strict=True))
    assert case.recipe.adversary.optimizer.betas[0] == 0.0 and case.recipe.average is not None
