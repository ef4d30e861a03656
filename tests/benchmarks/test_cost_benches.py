"""The cost benches at toy sizes: their structure, and the invariants that make a ratio mean something. No timings are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.benchmarks import gpu, kill, measuring, memory, overhead, speed, ssd_official
from expunge.benchmarks.testbed import shifted_or_mirrored
from expunge.engine.execute import forget_peak_memory, peak_memory_mb
from expunge.parts.plan import Optimizer
from expunge.tasks.base import Batch

# The official algorithm (Foster et al., eqs. 2-5) written the long way: what `ssd_official` must agree with when no checkout is here.
PEER = """
import torch
import torchvision
import wandb
from tqdm import tqdm

class ParameterPerturber:
    def __init__(self, model, opt, device, parameters):
        self.model, self.opt, self.device = model, opt, device
        self.alpha, self.lam = parameters["selection_weighting"], parameters["dampening_constant"]

    def calc_importance(self, loader):
        found = {n: torch.zeros_like(p) for n, p in self.model.named_parameters()}
        for x, _, y in loader:
            self.opt.zero_grad()
            torch.nn.CrossEntropyLoss()(self.model(x), y).backward()
            for n, p in self.model.named_parameters():
                found[n] += p.grad.clone().pow(2)
        return {n: v / float(len(loader)) for n, v in found.items()}

    @torch.no_grad()
    def modify_weight(self, of_all, of_forget):
        for n, p in self.model.named_parameters():
            where = of_forget[n] > of_all[n].mul(self.alpha)
            p[where] = p[where].mul((of_all[n].mul(self.lam)).div(of_forget[n]).pow(1)[where].clamp(max=1))
"""


def test_times_are_taken_in_turns_and_ratios_are_within_rounds() -> None:
    order: list[str] = []
    times = measuring.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, warm=False)
    assert order == ["a", "b", "b", "a"]
    assert {name: len(found) for name, found in times.seconds.items()} == {"a": 2, "b": 2}
    known = measuring.Times({"a": [2.0, 3.0, 9.0], "b": [1.0, 2.0, 1.0]})
    assert known.ratio("a", "b") == 2.0 and known.range("a", "b") == (1.5, 9.0) and known.best("a") == 2.0


def test_the_loop_makes_the_weights_of_the_bare_loop() -> None:
    row = overhead.measure("mlp", rows=200, epochs=2, rounds=1)
    assert row["largest weight difference"] == 0.0 and row["updates"] == 8
    case, _ = overhead.setup("mlp", 200, 2)
    trained = overhead.by_hand(case)
    assert overhead.difference(trained, case.fresh(overhead.SEED)) > 0.01


def test_the_memory_table_relates_peaks_to_fine_tunings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"idle": 100.0, "fine_tune": 200.0, "npo": 210.0, "control": 250.0}
    monkeypatch.setattr(memory, "in_process", lambda _module, _flag, method, *_: {"peak_mb": peaks[method]})
    rows = memory.main(["--shapes", "2x64", "--methods", "npo", "--rows", "100", "--out", str(tmp_path)])
    assert [row["method"] for row in rows] == ["fine_tune", "npo", "control", "fine_tune", "npo"]
    assert rows[1]["ratio"] == pytest.approx(1.05) and rows[1]["ratio net of idle"] == pytest.approx(1.1)
    assert "python -m expunge.benchmarks.memory" in (tmp_path / "memory.md").read_text()


@pytest.mark.parametrize("method", ["npo", "control"])
def test_what_a_memory_worker_runs(method: str) -> None:
    memory.work(method, "2x16", 100, same=True)
    assert peak_memory_mb() > 50


def test_the_peak_of_a_process_does_not_begin_at_its_parents() -> None:
    held = torch.ones(2**27)  # 512 MiB here, none of it in the child
    idle = measuring.in_process("expunge.benchmarks.memory", "--worker", "idle", "--shapes", "2x64", "--rows", "100")
    assert held.numel() and 100 < idle["peak_mb"] < peak_memory_mb() - 200


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel keeps no mark to start anew")
def test_a_later_run_does_not_inherit_an_earlier_ones_peak() -> None:
    held = torch.ones(2**27)  # 512 MiB
    before = peak_memory_mb()
    del held
    forget_peak_memory()
    assert peak_memory_mb() < before - 400


def test_every_method_of_a_memory_table_moves_by_the_same_optimizer() -> None:
    from expunge.methods.registry import find

    case = memory.setup("2x16", 100)
    plan = memory.same_optimizer(find("scrub").configure(epochs=1).action(case))
    assert plan.optimizer == Optimizer("sgd", lr=1e-4, momentum=0.9)


def test_ours_and_the_official_ssd_select_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "ssd.py").write_text(PEER)
    row = ssd_official.main([
        "--peer", str(tmp_path), "--kinds", "mlp", "--rows", "300", "--epochs", "3", "--rounds", "1", "--alpha", "1.5", "--out", "",
    ])[0]  # fmt: skip
    assert 0 < row["selected"] < 1 and row["selected by one side only"] == 0
    assert row["largest weight difference"] < 1e-6 and row["stored equals request"]


def test_a_missing_checkout_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ssd_official.UnmetNeed, match="ssd.py"):
        ssd_official.official(tmp_path)


def test_speed_relates_methods_to_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.toys import toy

    case = toy("class").case
    able, unable = speed.served(case, ["ssd", "gaussian_amnesiac", "retrain", "grad_ascent"])
    assert list(able) == ["ssd", "grad_ascent"] and "regression" in unable["gaussian_amnesiac"]
    monkeypatch.setattr(speed, "one_epoch", lambda case, seed: 2.0)
    rows = speed.run(case, able, around=4, repeats=1)
    assert {row["method"] for row in rows} == {"ssd", "grad_ascent"}
    for row in rows:
        assert row["ratio (40 epochs)"] == pytest.approx(row["s"] / 80.0)
        assert row["ratio (182 epochs)"] == pytest.approx(row["s"] / 364.0)
    assert [row["met"] for row in rows if row["method"] == "ssd"] == [True]
    assert speed.served(case, None, skip=["ssd"])[1]["ssd"] == "left out by --skip"


def test_pictures_are_shifted_and_mirrored_as_by_hand() -> None:
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    moved = shifted_or_mirrored(Batch(torch.arange(6), {"inputs": x}), torch.Generator().manual_seed(0))["inputs"]
    draws = torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    for i, (down, right, mirrored) in enumerate(draws.T.tolist()):
        one = padded[i, :, down : down + 32, right : right + 32]
        assert torch.equal(moved[i], one.flip(-1) if mirrored % 2 else one)


def test_both_precisions_are_run_and_told_apart() -> None:
    from tests.toys import toy

    row = gpu.halves(toy("class").case, ["grad_ascent"], rounds=1)[0]
    assert row["time ratio"] == pytest.approx(row["bf16, s"] / row["float32, s"])
    assert all(
        0 <= row[f"{split}, {kind}"] <= 1 for split in ("forget", "retain", "test") for kind in ("float32", "bf16")
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return kill.measure(tmp_path_factory.mktemp("kill"), points=1, writes=1, epochs=1, every=2, seed=0, fresh=0)


def test_killed_runs_end_with_the_undisturbed_tensors(killed: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    rows, about = killed
    assert about["changed"] > 0 and len(rows) >= 2
    assert all(row["equal"] for row in rows)
    writes = [row for row in rows if "writing" in row["killed"]]
    assert len(writes) == 1 and all(row["half-written files"] == 1 for row in writes)
    assert all(row["went on from step"] <= row["at step"] + 1 for row in rows)


def test_without_a_gpu_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        assert (
            "| cuda |"
            in gpu.main(["--parts", "loop", "--rounds", "1", "--rows", "256", "--epochs", "1", "--out", ""])["loop"]
        )
    else:
        assert gpu.main([]) == {} and "no CUDA device" in capsys.readouterr().out


def test_tables_hold_what_was_measured() -> None:
    text = measuring.table([{"a": 1.23456, "b": True, "c": None}, {"a": 12345.6, "b": False, "c": "x"}])
    assert text.splitlines()[2:] == ["| 1.23 | yes |  |", "| 12346 | NO | x |"]
    assert json.dumps(measuring.in_turns({"a": lambda: None}, 1).seconds)
