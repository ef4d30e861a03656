"""The regression checks on diabetes: forgetting the low targets, original against retrained."""

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import nn

from expunge.audits import Subjects, checks, make_gold, run_checks
from expunge.cases.case import Case
from expunge.cases.data import TensorData
from expunge.cases.requests import where
from expunge.parts.plan import Optimizer, Training

RECIPE = Training(epochs=40, batch_size=64, optimizer=Optimizer("adam", lr=3e-3))


@pytest.fixture(scope="module")
def audit():
    from expunge import engine

    x, y = load_diabetes(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 0.05, torch.tensor(y, dtype=torch.float32) / 10
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    case = Case(
        net, TensorData(inputs=x[:340], labels=y[:340]), where("labels", "<", 8.0), task="regression",
        test=TensorData(inputs=x[340:], labels=y[340:]), recipe=RECIPE,
    )  # fmt: skip
    original = engine.fit(case, "train", seed=1)
    first, second = (make_gold("retrain", case, seed=seed) for seed in (2, 3))
    return Subjects(case, original, original, first, second, resamples=40)


def test_original_stands_out_and_the_floor_is_small(audit):
    found = {row.name: row for row in run_checks(audit, ["error", "wasserstein", "relative_gap", "mia_regression"])}
    assert found["wasserstein"].retrained == 0 and found["wasserstein"].original > 2 * found["wasserstein"].floor
    assert found["error_forgotten"].retrained > found["error_forgotten"].original
    assert found["error_forget_rows"].gap < 0 and found["error_kept"].direction == "lower"
    assert found["relative_gap"].original > found["relative_gap"].floor and found["relative_gap"].retrained == 0
    assert found["mia_regression"].original > found["mia_regression"].retrained


def test_every_check_without_ensembles_serves_regression(audit):
    served = checks("regression")
    assert {"error", "wasserstein", "membership", "mia_loss", "utility", "ain"} <= served.keys()
    rows = run_checks(audit, ["membership", "mia_loss", "utility", "forget_score", "weight_difference"])
    assert all(row.unlearned is not None and row.floor is not None for row in rows)
    utility = next(row for row in rows if row.name == "utility_test")
    assert utility.unit == "fit" and utility.unlearned < 0


def test_ain_and_relearn_time_of_the_original_are_below_the_retrained(audit):
    rows = run_checks(
        audit, ["ain", "relearn_time"], {"relearn_time": {"threshold": 3.0, "lr": 0.01, "max_steps": 150}}
    )
    ain, time = rows
    assert ain.original == 0.0 and ain.retrained == 1.0 and "steps: original 0" in ain.note
    assert time.original < time.retrained
