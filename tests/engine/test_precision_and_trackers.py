"""What accelerate carries: mixed precision stays near full precision, and trackers hear the losses."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import nn

from expunge import Case, Optimizer, Regression, TensorData, Training, requests, unlearn
from expunge.engine import fit
from expunge.errors import BadSetting
from toys import digits, mlp


@cache
def case(kind: str = "classification") -> Case:
    x, y, x_test, y_test = digits(150)
    recipe = Training(epochs=15, batch_size=32, optimizer=Optimizer("sgd", lr=0.1, momentum=0.9))
    if kind == "regression":
        y, y_test = y.float() / 10, y_test.float() / 10
        made = Case(mlp(64, (16,), 1), TensorData(inputs=x, labels=y), requests.where("labels", "<", 0.15),
                    test=(x_test, y_test), task=Regression(), recipe=recipe)  # fmt: skip
    else:
        made = Case(
            mlp(64, (16,)), TensorData(inputs=x, labels=y), requests.label(3), test=(x_test, y_test), recipe=recipe
        )
    return made.with_(model=fit(made, "train", 0))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


PLANS = [
    ("fine_tune", {"epochs": 2}, "classification"),
    ("scrub", {"lr": 0.01, "epochs": 2, "msteps": 1, "retain_batch_size": 32}, "classification"),
    ("npo", {"lr": 0.01, "epochs": 2, "batch_size": 32}, "classification"),
    ("salun", {"lr": 0.01, "epochs": 2, "batch_size": 32}, "classification"),
    ("blindspot", {"epochs": 1, "batch_size": 32, "proxy_epochs": 1}, "regression"),
]


@pytest.mark.parametrize(("name", "settings", "kind"), PLANS, ids=[p[0] for p in PLANS])
def test_bf16_ends_near_fp32_and_is_not_fp32(name, settings, kind):
    """bfloat16 keeps 8 bits: the step differs by some per cent, and the weights stay float32."""
    here = case(kind)
    full = unlearn(here, name, seed=1, floor=None, **settings).model
    half = unlearn(here, name, seed=1, floor=None, mixed_precision="bf16", device="cpu", **settings).model
    assert all(p.dtype == torch.float32 for p in half.parameters())
    step = flat(full) - flat(here.model)
    apart = float((flat(half) - flat(full)).norm() / step.norm())
    assert 0 < apart < 0.2, apart


class Heard(GeneralTracker):
    """A tracker of accelerate that only listens."""

    name = "heard"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    @property
    def tracker(self) -> Heard:
        return self

    def store_init_configuration(self, values: dict) -> None:
        pass

    def log(self, values: dict, step: int | None = None, **_: object) -> None:
        self.lines.append((step, dict(values)))

    def finish(self) -> None:
        self.finished = True


def test_a_tracker_hears_the_losses_that_metrics_jsonl_holds(tmp_path):
    heard = Heard()
    outcome = unlearn(case(), "salun", seed=1, trackers=[heard], run=tmp_path / "run", epochs=2, batch_size=32)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert heard.lines and heard.finished
    assert heard.lines == [(line["step"], line["losses"]) for line in written if line.get("losses")]
    silent = unlearn(case(), "salun", seed=1, epochs=2, batch_size=32)
    assert torch.equal(flat(outcome.model), flat(silent.model))


def test_one_process_may_use_several_precisions_one_after_another():
    """accelerate keeps one state per process, and refuses another precision than its first."""
    digests = []
    for precision in ("bf16", "no", "bf16"):
        outcome = unlearn(case(), "fine_tune", seed=1, epochs=1, mixed_precision=precision, device="cpu")
        digests.append(outcome.record["weights"]["after"])
    assert digests[0] == digests[2] != digests[1]
    assert digests[1] == unlearn(case(), "fine_tune", seed=1, epochs=1).record["weights"]["after"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(BadSetting, match="cuda"):
        unlearn(case(), "fine_tune", device="cuda")
    with pytest.raises(BadSetting, match="bf16"):
        unlearn(case(), "fine_tune", mixed_precision="bf17")
