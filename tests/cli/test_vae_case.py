"""A user's conditional autoencoder from a file: `module:function`, a table, a judge, and back to weights of the same module."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_vae
from command_line import command, written
from expunge import Vae
from tiny_vae import TinyVae, images
from toys import toy

FORGET = 0


@pytest.fixture
def case_file(tmp_path, monkeypatch):
    save_file(toy("vae").original.state_dict(), tmp_path / "vae.safetensors")
    (tmp_path / "my_vae.py").write_text(inspect.getsource(tiny_vae))
    for name, split, rows in (("train", "train", 400), ("test", "test", 200)):
        x, y = images(split, rows)
        np.savez(tmp_path / f"{name}.npz", inputs=x.numpy(), labels=y.numpy())
    content = {
        "name": "digits", "task": "vae", "model": {"factory": "my_vae:TinyVae", "weights": "vae.safetensors"},
        "data": "train.npz", "test": "test.npz", "request": {"label": FORGET}, "floor": None,
        "recipe": {"epochs": 10, "batch_size": 32, "optimizer": {"name": "adam", "lr": 0.005}},
        "audit": {"judge": "my_vae:nearest", "attacks": False},
        "method": {"name": "selective_amnesia", "lam": 1.0, "samples": 20, "images": 200, "steps": 200, "lr": 0.003,
                   "batch_size": 32, "clip": None},
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return written(tmp_path, content)


def test_a_run_ends_in_weights_of_the_same_module_that_no_longer_draw_the_class(case_file, tmp_path):
    assert "valid" in command("validate", case_file)
    command("run", case_file, "--out", tmp_path / "run")
    model = TinyVae()
    model.load_state_dict(load_file(tmp_path / "run" / "model" / "model.safetensors"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    by_name = {m["name"]: m for m in results["measurements"]}
    gone, kept = by_name["class_probability"], by_name["kept_accuracy"]
    assert gone["original"] > 0.7 and gone["unlearned"] < 0.5 and kept["unlearned"] > kept["original"] - 10
    assert by_name["class_entropy"]["unlearned"] > by_name["class_entropy"]["original"] + 0.5
    labels = torch.full((200,), FORGET)
    by_hand = tiny_vae.nearest(Vae().sample(model, labels, seed=9))[:, FORGET].mean()
    assert gone["unlearned"] == pytest.approx(
        float(by_hand), abs=0.1
    )  # the file's weights are the measured ones, other latents


def test_what_the_case_lacks_is_said_before_any_compute(case_file):
    for change, told in (
        ("task=classification", "expected task: gan or vae"),
        ("task={name: vae, likelihood: poisson}", "expected a likelihood, one of bernoulli, logits, gaussian"),
    ):
        shown = " ".join(command("validate", case_file, change, code=2).split())
        assert told in shown, shown
