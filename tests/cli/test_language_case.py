"""A language case from a file: a transformers folder, a table of questions, a request by column, and back to a folder."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from command_line import command, written
from toys import facts, tiny_llama_folder


@pytest.fixture
def case_file(tmp_path):
    tiny_llama_folder(tmp_path / "model")
    for name, people in (("train", range(6)), ("unseen", range(30, 34))):
        rows = zip(*facts(people), strict=True)
        lines = [json.dumps({"q": q, "a": a, "person": p}) for q, a, p in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "idk.txt").write_text("i do not know that .\n\nnobody told me that .\n")
    text = {"question": "q", "answer": "a", "template": "{question}", "refusals": "idk.txt"}
    content = {
        "name": "facts", "model": "model", "task": "language", "data": {"path": "train.jsonl", "text": text},
        "holdout": {"path": "unseen.jsonl", "text": text | {"refusals": None}}, "request": {"where": ["person", "==", 5]},
        "recipe": {"epochs": 1, "batch_size": 8, "optimizer": {"name": "adamw", "lr": 0.01}},
        "method": {"name": "idk", "lr": 0.01, "epochs": 2, "batch_size": 4},
    }  # fmt: skip
    return written(tmp_path, content)


def test_a_run_ends_in_a_folder_that_transformers_loads(case_file, tmp_path):
    assert "valid" in command("validate", case_file)
    shown = command("run", case_file, "--dry-run")
    assert "relabel(refusal)" in shown
    command("run", case_file, "--no-audit", "--out", tmp_path / "run", "floor=null")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert any(not torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token == "<eos>"
    written = "".join(f.read_text() for f in (tmp_path / "run").glob("*.json*"))
    assert "p5" not in written  # forgotten text is in no record


def test_a_column_that_is_not_there_and_a_folder_without_tokenizer_are_told(case_file, tmp_path):
    shown = command("validate", case_file, "data.text.question=question", code=2)
    assert "name yours" in " ".join(shown.split())
    for file in (tmp_path / "model").glob("token*"):
        file.unlink()
    shown = command("validate", case_file, code=2)
    assert "tokenizer" in shown
