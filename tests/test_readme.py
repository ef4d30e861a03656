"""The first page runs: the README's Python blocks, on a toy."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from toys import digits, toy

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_blocks_run(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    x, y, x_test, y_test = digits()
    scope = {"model": toy("class").original, "X": x, "y": y, "X_test": x_test, "y_test": y_test}
    torch.manual_seed(0)
    exec(blocks[0], scope)
    assert {f.name for f in Path("runs/first").iterdir()} == {
        "results.json",
        "report.html",
        "model",
        "certificate.json",
    }
    told = capsys.readouterr().out
    assert "original" in told and "retrained" in told and "floor" in told
    exec(blocks[1].replace("epochs=5", "epochs=1"), scope)
    assert "npo" in scope["outcome"].formula
