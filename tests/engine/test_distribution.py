"""Two processes (gloo, CPU) make the losses and the weights of one, with whole copies and with FSDP2's shards.

The shards are tested where EXPUNGE_TEST_SHARDS is set (`make test-shards`): they take minutes where cores are busy.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expunge.engine.distribution import Distribution, fitted
from expunge.errors import BadSetting

WORKER = Path(__file__).with_name("distributed_worker.py")
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1",
}  # fmt: skip
SHARDS = pytest.mark.skipif(
    not os.environ.get("EXPUNGE_TEST_SHARDS"), reason="needs EXPUNGE_TEST_SHARDS (make test-shards)"
)
MODES = ("copies", "shards") if os.environ.get("EXPUNGE_TEST_SHARDS") else ("copies",)


def run(out: Path, processes: int, *modes: str) -> dict:
    out.mkdir()
    launch = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    done = subprocess.run(
        [*launch, str(WORKER), str(out), *modes], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "found.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    one = run(folder / "one", 1, "copies")
    two = run(folder / "two", 2, *MODES)
    return folder, one["copies"], two


@pytest.mark.parametrize("mode", ["copies", pytest.param("shards", marks=SHARDS)])
def test_two_processes_give_the_losses_of_one(runs, mode):
    folder, one, two = runs
    assert "npo" in two[mode] and ("classifier" in two[mode]) == (mode == "copies")
    furthest = {"loss": 0.0, "weight": 0.0}
    for name in one.keys() & two[mode].keys():
        found = two[mode][name]
        assert found["sharded"] == (mode == "shards"), name
        assert found["processes"] == ("2, weights cut over them" if mode == "shards" else "2, each with a copy"), name
        assert found["ended"] == one[name]["ended"], name
        assert len(found["history"]) == len(one[name]["history"])
        for mine, theirs in zip(found["history"], one[name]["history"], strict=True):
            for term, loss in theirs["losses"].items():
                apart = abs(mine["losses"][term] - loss)
                furthest["loss"] = max(furthest["loss"], apart)
                assert apart < 1e-5, (name, term)
        a, b = (
            load_file(f)
            for f in (folder / "one" / f"copies-{name}.safetensors", folder / "two" / f"{mode}-{name}.safetensors")
        )
        assert a.keys() == b.keys()
        for key in a:
            furthest["weight"] = max(furthest["weight"], float((a[key] - b[key]).abs().max()))
            assert torch.allclose(a[key], b[key], atol=1e-5), (name, key)
    print(
        f"{mode}: largest difference from one process, of a loss {furthest['loss']:.1e}, of a weight {furthest['weight']:.1e}"
    )


@pytest.mark.parametrize("mode", ["copies", pytest.param("shards", marks=SHARDS)])
def test_a_run_of_two_processes_goes_on_from_its_checkpoint(runs, mode):
    """Stopped at an update in the middle and started again: the tensors of the run that was not. The first process writes slowly:
    a second one that did not wait for it would go on from an older checkpoint, and both would wait for each other."""
    folder, _, two = runs
    a, b = (load_file(folder / "two" / f"{mode}-{name}.safetensors") for name in ("npo", "resumed"))
    assert two[mode]["resumed"]["history"] == two[mode]["npo"]["history"]
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_processes_that_do_not_work_together_are_refused(monkeypatch):
    """Each would do the whole work, and the result would look right: accelerate does so on CPUs unless it is told of them."""
    asked: list[bool] = []

    class Alone:
        num_processes, process_index, device, state = 1, 0, torch.device("cpu"), None

        def __init__(self, cpu, **_):
            asked.append(cpu)

    monkeypatch.setattr("accelerate.Accelerator", Alone)
    monkeypatch.setattr("expunge.engine.distribution._devices", lambda: False)
    assert Distribution.make().count == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadSetting, match="expected 2 processes to work together, found 1"):
        Distribution.make()
    assert asked == [False, True]


def test_one_process_needs_none_of_it():
    alone, model = Distribution(), torch.nn.Linear(2, 3)
    assert alone.shard(model) is model and alone.gather(model) is model and alone.now(model.weight) is model.weight
    assert not alone.sharded and alone.agreed(True) and not alone.agreed(False)
    assert torch.equal(fitted(torch.ones(3, 2), model.weight), torch.ones(3, 2))
