"""Models of `protect` on disk: what is read back serves requests to the same tensors as what was kept in memory."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from expunge import Case, Optimizer, TensorData, Training, protect, requests, unlearn
from expunge.errors import BadModel, ExpungeError
from expunge.files import digest_weights
from expunge.methods.stored import load_protected, save_protected
from toys import digits, mlp

ROWS = 120
KINDS = [
    ("sisa", {"shards": 2, "slices": 2}),
    ("acu", {"width": 40}),
    ("acu", {"width": 40, "form": "recursive"}),
    ("acu", {"width": 40, "backbone": "model"}),
    ("certified_removal", {"lam": 0.05}),
    ("certified_removal", {"lam": 0.05, "backbone": "model"}),
    ("amnesiac", {}),
]
NAMES = [f"{name}-{'-'.join(map(str, s.values()))}" for name, s in KINDS]


def net() -> nn.Module:
    torch.manual_seed(0)
    return mlp(64, (12,))


def small(request: requests.Request, model: nn.Module | None = None) -> Case:
    x, y, _, _ = digits(ROWS)
    recipe = Training(epochs=2, batch_size=32, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9))
    return Case(model or net(), TensorData(inputs=x, labels=y), request, recipe=recipe, build=net)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@cache
def made(number: int) -> nn.Module:
    name, settings = KINDS[number]
    return protect(small(requests.samples([5])), name, seed=3, **settings)


@pytest.mark.parametrize("number", range(len(KINDS)), ids=NAMES)
def test_two_requests_from_disk_end_in_the_tensors_of_one_process(number, tmp_path):
    name, model = KINDS[number][0], made(number)
    save_protected(model, tmp_path / "first")
    kept = load_protected(net(), tmp_path / "first")
    assert type(kept) is type(model) and same(tensors(kept), tensors(model))
    x = digits(ROWS)[0]
    assert torch.equal(kept(x), model(x))
    for turn, rows in enumerate(([5, 6, 40], [7])):
        memory = unlearn(small(requests.samples(rows), model), name, seed=1, floor=None)
        disk = unlearn(small(requests.samples(rows), kept), name, seed=1, floor=None, run=tmp_path / f"run{turn}")
        assert same(tensors(memory.model), tensors(disk.model)) and memory.proof == disk.proof
        model, kept = memory.model, load_protected(net(), tmp_path / f"run{turn}" / "model")
        assert same(tensors(kept), tensors(model))
    with pytest.raises(ExpungeError, match="forgotten"):
        unlearn(small(requests.samples([6]), kept), name)


FRESH = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from methods.test_stored import KINDS, NAMES, served
from expunge.methods.stored import load_protected
from methods.test_stored import net
print(json.dumps({{n: served(k[0], load_protected(net(), {folder!r} + "/" + n)) for k, n in zip(KINDS, NAMES)}}))
"""


def served(name: str, model: nn.Module) -> str:
    """Digest of what a request leaves."""
    return digest_weights(
        unlearn(small(requests.samples([5, 6, 40]), model), name, seed=1, floor=None).model.state_dict()
    )


def test_a_fresh_process_serves_the_request_to_the_same_bits(tmp_path):
    for number, label in enumerate(NAMES):
        save_protected(made(number), tmp_path / label)
    code = FRESH.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(found) == {label: served(KINDS[i][0], made(i)) for i, label in enumerate(NAMES)}


def test_the_files_are_no_pickle_hold_no_rows_and_belong_to_their_owner(tmp_path):
    model = protect(small(requests.samples([5])), "certified_removal", lam=0.05)
    folder = save_protected(model, tmp_path / "kept")
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "protected.json"}
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    about = json.loads((folder / "protected.json").read_text())
    assert about["method"] == "certified_removal" and about["structure"]["lam"] == 0.05
    assert all(not isinstance(value, (list, dict)) for value in about["structure"].values())


def test_amnesiacs_log_is_in_the_folder_and_what_was_taken_back_is_erased_there(tmp_path):
    from safetensors.torch import load_file

    model = protect(small(requests.samples([5])), "amnesiac", sensitive="request")
    logged = load_file(save_protected(model, tmp_path / "kept") / "model.safetensors")["updates"]
    assert len(logged) == 2 and logged.abs().sum(1).gt(0).all()  # one batch of each of two epochs held row 5
    unlearn(small(requests.samples([5]), load_protected(net(), tmp_path / "kept")), "amnesiac", run=tmp_path / "run",
            floor=None)  # fmt: skip
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")["updates"].count_nonzero() == 0


def test_what_does_not_belong_together_is_refused(tmp_path):
    case = small(requests.samples([5]))
    one = save_protected(protect(case, "acu", width=30, seed=1), tmp_path / "one")
    two = save_protected(protect(case, "acu", width=30, seed=2), tmp_path / "two")
    (one / "model.safetensors").write_bytes((two / "model.safetensors").read_bytes())
    with pytest.raises(BadModel, match="both files of one folder"):
        load_protected(net(), one)
    about = json.loads((two / "protected.json").read_text())
    for change, words in (
        ({"structure": {**about["structure"], "width": 31}}, "shapes"),
        ({"structure": {"shards": 3}}, "structure of a acu model"),
        ({"method": "salun"}, "acts at training time"),
        ({"format": "other"}, "another format"),
    ):
        (two / "protected.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(BadModel, match=words):
            load_protected(net(), two)
    (two / "protected.json").unlink()
    with pytest.raises(BadModel, match="expunge protect"):
        load_protected(net(), two)
    with pytest.raises(BadModel, match="ordinary"):
        save_protected(net(), tmp_path / "three")
