"""The ready files of configs/accelerate: read by accelerate's own loader, and launched on two processes (gloo, CPU).

DeepSpeed's is only read: it has no CPU build here. The others are launched where EXPUNGE_TEST_SHARDS is set (`make test-shards`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from safetensors.torch import load_file

from command_line import written
from toys import facts, tiny_llama_folder

FILES = sorted((Path(__file__).parents[2] / "configs" / "accelerate").glob("*.yaml"))
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHARDS = pytest.mark.skipif(
    not os.environ.get("EXPUNGE_TEST_SHARDS"), reason="needs EXPUNGE_TEST_SHARDS (make test-shards)"
)


def test_every_kind_has_its_file():
    assert {file.stem for file in FILES} == set(KINDS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_file(file):
    """Its loader refuses a key that it does not know, as `accelerate launch` would."""
    found = load_config_from_file(str(file))
    assert isinstance(found, ClusterConfig)
    assert found.distributed_type.value == KINDS[file.stem] and found.num_processes == 2
    if file.stem == "fsdp2":
        assert found.fsdp_config["fsdp_version"] == 2
    if file.stem == "deepspeed":
        assert found.deepspeed_config["zero_stage"] == 0  # higher stages cut weights behind the engine's back: refused


def test_a_key_that_accelerate_does_not_know_is_refused(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(FILES[0].read_text() + "number_of_processes: 2\n")
    with pytest.raises(ValueError, match="number_of_processes"):
        load_config_from_file(str(wrong))


@pytest.fixture
def case_file(tmp_path):
    tiny_llama_folder(tmp_path / "model")
    rows = [json.dumps({"q": q, "a": a, "person": p}) for q, a, p in zip(*facts(range(6)), strict=True)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    content = {
        "name": "facts", "model": "model", "task": "language",
        "data": {"path": "train.jsonl", "text": {"question": "q", "answer": "a", "template": "{question}"}},
        "request": {"where": ["person", "==", 5]},
        "method": {"name": "npo", "lr": 0.01, "epochs": 3, "batch_size": 2},
    }  # fmt: skip
    return written(tmp_path, content)


def run(case: Path, out: Path, *launcher: str) -> tuple[list[dict], dict[str, torch.Tensor], str]:
    """(losses of each update, weights, what it says of its processes) of a run of the command line."""
    arguments = ["-m", "expunge", "run", str(case), "--no-audit", "--out", str(out), "floor=null"]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], env=ENVIRONMENT, cwd=out.parent, capture_output=True, text=True, timeout=240
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    record = json.loads((out / "outcome.json").read_text())["record"]
    return (
        [json.loads(line)["losses"] for line in lines],
        load_file(out / "model" / "model.safetensors"),
        str(record["notes"].get("processes", "1")),
    )


@SHARDS
@pytest.mark.parametrize(
    ("name", "precision", "close"), [("ddp", "no", 1e-5), ("fsdp2", "no", 1e-5), ("fsdp2", "bf16", 2e-3)],
)  # fmt: skip
def test_a_launch_by_the_file_gives_what_one_process_gives(name, precision, close, case_file, tmp_path):
    """In float32 to 1e-5; FSDP2's file asks for bfloat16, whose losses agree to its rounding (relative)."""
    losses, weights, alone = run(case_file, tmp_path / "one")
    file = next(f for f in FILES if f.stem == name)
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(file),
        "--num_processes",
        "2",
        "--mixed_precision",
        precision,
    ]
    found, both, joined = run(case_file, tmp_path / "two", *launch, "--main_process_port", "0")
    assert alone == "1" and joined == ("2, each with a copy" if name == "ddp" else "2, weights cut over them")
    assert len(found) == len(losses) == 6
    for mine, theirs in zip(found, losses, strict=True):
        for term, loss in theirs.items():
            assert abs(mine[term] - loss) < close * (abs(loss) if precision == "bf16" else 1.0), term
    assert both.keys() == weights.keys()
    if precision == "no":
        for key, value in weights.items():
            assert torch.allclose(both[key], value, atol=1e-5), key
