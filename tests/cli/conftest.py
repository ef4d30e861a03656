"""A case as a user has it: a module with a function, safetensors weights, npz tables and a YAML file in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from expunge import Case, Optimizer, TensorData, Training, fit, requests
from expunge.cli.main import app
from toys import digits, mlp

CASE = """
name: threes
model: {factory: "small_net:build", weights: net.safetensors}
data: {path: train.npz, columns: {inputs: pixels, labels: digit}}
test: {path: test.npz, columns: {inputs: pixels, labels: digit}}
request: {label: 3}
recipe: {epochs: 5, batch_size: 64, optimizer: {name: sgd, lr: 1e-1, momentum: 0.9}}
method: {name: salun, density: 0.5, epochs: 2, batch_size: 64}
out: runs/threes
"""
NET = """
from torch import nn

def build(hidden=16):
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder's files but the YAML, made once: 200 real digits and a net of 16 hidden units."""
    folder = tmp_path_factory.mktemp("trained")
    x, y, x_test, y_test = digits(200)
    recipe = Training(5, 64, Optimizer("sgd", lr=0.1, momentum=0.9))
    case = Case(mlp(64, (16,)), TensorData(inputs=x, labels=y), requests.label(3), recipe=recipe)
    save_file(fit(case, "train", 0).state_dict(), folder / "net.safetensors")
    np.savez(folder / "train.npz", pixels=x.numpy(), digit=y.numpy())
    np.savez(folder / "test.npz", pixels=x_test[:200].numpy(), digit=y_test[:200].numpy())
    (folder / "small_net.py").write_text(NET)
    return folder


@pytest.fixture
def case_file(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """case.yaml in a fresh folder with links to the files; commands run elsewhere, so paths must be the file's."""
    home = tmp_path / "home"
    home.mkdir()
    for file in trained.iterdir():
        if file.is_file():
            (home / file.name).symlink_to(file)
    (home / "case.yaml").write_text(CASE)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return home / "case.yaml"


class Shell:
    """`shell("ls", "methods")` -> the result; output holds stdout and stderr, in one line of words for comparing."""

    def __call__(self, *arguments: object):
        result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
        result.text = " ".join(result.output.replace("│", " ").split())
        return result


@pytest.fixture
def shell() -> Shell:
    return Shell()
