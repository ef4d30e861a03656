"""Models trained together equal the same models trained one after another."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from expunge.cases.data import Split, TensorData
from expunge.engine.ensemble import Ensemble
from expunge.engine.stacked_training import Table, learning_rate, member_batches
from expunge.errors import BadData, BadModel, BadSetting
from expunge.parts.plan import Optimizer, Training
from expunge.tasks.classification import Classification

TASK = Classification()
PIXELS, LABELS = load_digits(return_X_y=True)
DATA = TensorData(inputs=torch.tensor(PIXELS[:300] / 16).double(), labels=torch.tensor(LABELS[:300]))
IMAGES = DATA.replaced(inputs=DATA.columns["inputs"].reshape(-1, 1, 8, 8))
OPTIMIZERS = {
    "sgd": Optimizer("sgd", lr=0.1),
    "momentum": Optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": Optimizer("adam", lr=1e-3, weight_decay=1e-3),
    "adamw_cosine": Optimizer("adamw", lr=1e-3, weight_decay=1e-2, schedule="cosine"),
    "clipped_warm_steps": Optimizer("sgd", lr=0.2, clip=0.5, schedule="steps", milestones=(1, 2), warmup=0.2),
}


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).double()


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)
    ).double()  # fmt: skip


def subsets(*sizes: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randperm(len(DATA), generator=rng)[:n] for n in sizes]


def alone(model: nn.Module, data: TensorData, rows: torch.Tensor, training: Training, seed: int) -> nn.Module:
    """Ordinary training written out here, on the batches that the ensemble announces for this member."""
    spec, model = training.optimizer, model.train()
    common = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    if spec.name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), momentum=spec.momentum, **common)
    else:
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.name](model.parameters(), **common)
    per_epoch = math.ceil(len(rows) / training.batch_size)
    for step, index in enumerate(member_batches(rows, training, seed)):
        batch = data.fetch(index)
        loss = nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        if spec.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), spec.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(spec, step, training.epochs * per_epoch, step // per_epoch)
        optimizer.step()
    assert step + 1 == training.epochs * per_epoch
    return model


def assert_same(found: nn.Module, expected: nn.Module, tolerance: float) -> None:
    assert list(found.state_dict()) == list(expected.state_dict()) and type(found) is type(expected)
    for name, value in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[name].double(), value.double(), atol=tolerance, rtol=tolerance), name


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sizes", [(50, 50, 50), (50, 13, 90, 16)], ids=["equal", "unequal"])
def test_member_equals_training_alone(name: str, sizes: tuple[int, ...]) -> None:
    training = Training(epochs=3, batch_size=16, optimizer=OPTIMIZERS[name])
    members, seeds = subsets(*sizes), [7, 8, 9, 10][: len(sizes)]
    ensemble = Ensemble.train(mlp, TASK, DATA, members, training, seeds)
    for i, (rows, seed) in enumerate(zip(members, seeds, strict=True)):
        assert_same(ensemble.model(i), alone(mlp(seed), DATA, rows, training, seed), 1e-10)


def test_single_precision_within_1e_5() -> None:
    data = DATA.replaced(inputs=DATA.columns["inputs"].float())
    training = Training(epochs=3, batch_size=16, optimizer=OPTIMIZERS["momentum"])
    members = subsets(60, 40, 60)
    ensemble = Ensemble.train(lambda seed: mlp(seed).float(), TASK, data, members, training, [1, 2, 3])
    for i, rows in enumerate(members):
        assert_same(ensemble.model(i), alone(mlp(i + 1).float(), data, rows, training, i + 1), 1e-5)


@pytest.mark.parametrize("sizes", [(48, 48, 40, 40), (33, 48, 20, 47)], ids=["pairs", "unequal"])
def test_batch_norm_statistics_are_each_members_own(sizes: tuple[int, ...]) -> None:
    training = Training(epochs=2, batch_size=16, optimizer=OPTIMIZERS["momentum"])
    members = subsets(*sizes)
    members = [m[: len(m) - (len(m) % 16 == 1)] for m in members]  # a last batch of one has no batch statistics
    seeds = [1, 2, 3, 4]
    together = Ensemble.train(conv, TASK, IMAGES, members, training, seeds)
    one_by_one = Ensemble.train(conv, TASK, IMAGES, members, training, seeds, vectorised=False)
    for i, (rows, seed) in enumerate(zip(members, seeds, strict=True)):
        untrained = Ensemble.train(conv, TASK, IMAGES, [rows], Training(epochs=0), [seed]).model(0)
        truth = alone(copy.deepcopy(untrained), IMAGES, rows, training, seed)
        assert int(truth[1].num_batches_tracked) == 2 * math.ceil(len(rows) / 16)
        assert float((truth[1].running_mean - untrained[1].running_mean).abs().max()) > 1e-3
        assert_same(together.model(i), truth, 1e-9)
        assert_same(one_by_one.model(i), truth, 1e-12)


def test_equals_the_engines_own_training() -> None:
    engine = pytest.importorskip("expunge.engine")
    from expunge.cases import requests
    from expunge.cases.case import Case

    training = Training(epochs=2, batch_size=16, optimizer=Optimizer("sgd", lr=0.1, momentum=0.9, schedule="cosine"))
    case = Case(mlp(0), DATA, requests.samples([0, 1]), recipe=training)
    members = subsets(40, 70)
    ensemble = Ensemble.train(case.fresh, case.task, case.data, members, training, [3, 4])
    for i, rows in enumerate(members):
        assert_same(ensemble.model(i), engine.fit(case, Split("member", DATA, rows), 3 + i), 1e-9)


def test_chunks_masks_and_order_change_nothing() -> None:
    training = Training(epochs=2, batch_size=16, optimizer=OPTIMIZERS["adam"])
    members = [rows.sort().values for rows in subsets(30, 61, 44, 30, 18)]
    mask = torch.zeros(5, len(DATA), dtype=torch.bool)
    for row, own in zip(mask, members, strict=True):
        row[own] = True
    whole = Ensemble.train(mlp, TASK, DATA, members, training, range(5))
    others = [
        Ensemble.train(mlp, TASK, DATA, members, training, range(5), chunk=2),
        Ensemble.train(mlp, TASK, DATA, mask, training, range(5), chunk=3),
        Ensemble.train(mlp, TASK, DATA, members, training, range(5), vectorised=False),
    ]
    for other in others:
        for name, value in whole.parameters.items():
            assert torch.allclose(other.parameters[name], value, atol=1e-10), name
    turned = Ensemble.train(mlp, TASK, DATA, members[::-1], training, list(range(5))[::-1])
    assert torch.allclose(turned.parameters["0.weight"].flip(0), whole.parameters["0.weight"], atol=1e-10)
    again = Ensemble.train(mlp, TASK, DATA, members, training, range(5))
    assert all(torch.equal(again.parameters[k], v) for k, v in whole.parameters.items())


def test_predict_and_signals_equal_the_loop() -> None:
    training = Training(epochs=2, batch_size=16, optimizer=OPTIMIZERS["momentum"])
    ensemble = Ensemble.train(conv, TASK, IMAGES, subsets(48, 48, 48), training, [1, 2, 3], chunk=2)
    split = Split("test", IMAGES, torch.arange(200, 290))
    logits, margins = ensemble.predict(split, batch_size=32), ensemble.signals(split, "margin", batch_size=32)
    assert logits.shape == (3, 90, 10) and margins.shape == (3, 90)
    batch = IMAGES.fetch(split.ids)
    for i, model in enumerate(ensemble.models()):
        assert not model.training
        with torch.no_grad():
            output = TASK.forward(model, batch)
        assert torch.allclose(logits[i], output.prediction, atol=1e-10)
        assert torch.allclose(margins[i], TASK.signals(output, batch)["margin"], atol=1e-9)
    with pytest.raises(BadSetting, match="Did you mean 'margin'"):
        ensemble.signals(split, "margins")
    assert torch.allclose(Ensemble.from_models(ensemble.models(), TASK).predict(split), logits, atol=1e-10)


def test_shadow_models_memorise_their_own_rows() -> None:
    """What ensembles are for: margins of members are above margins of non-members on the very same rows."""
    mask = torch.rand(8, len(DATA), generator=torch.Generator().manual_seed(0)) < 0.3
    training = Training(epochs=25, batch_size=16, optimizer=OPTIMIZERS["momentum"])
    margins = Ensemble.train(mlp, TASK, DATA, mask, training, range(8)).signals(Split("all", DATA, torch.arange(300)))
    assert float(margins[mask].mean() - margins[~mask].mean()) > 0.5


def test_frozen_and_tied_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.second(self.first(x).relu()).relu())

    training = Training(epochs=2, batch_size=16, optimizer=OPTIMIZERS["momentum"])
    rows = subsets(40, 25)
    arguments = (lambda: Tied().double(), TASK, DATA, rows)
    together = Ensemble.train(*arguments, training, [1, 2])
    apart = Ensemble.train(*arguments, training, [1, 2], vectorised=False)
    start = Ensemble.train(*arguments, Training(epochs=0), [1, 2])
    for i in range(2):
        assert_same(together.model(i), apart.model(i), 1e-10)
        member = together.model(i)
        assert member.second.weight is member.first.weight
    assert torch.equal(together.parameters["first.bias"], start.parameters["first.bias"])
    assert not torch.equal(together.parameters["first.weight"], start.parameters["first.weight"])


class Counting(nn.Module):
    """Counts its training batches in a buffer, as exponential averages and the like do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10).double()
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.batches.add_(1)
        return self.layer(x)


def test_buffers_of_a_finished_member_stand_still() -> None:
    ensemble = Ensemble.train(Counting, TASK, DATA, subsets(16, 80), Training(epochs=2, batch_size=16), [1, 2])
    assert ensemble.buffers["batches"].tolist() == [2, 10]
    assert float(ensemble.model(1).batches) == 10


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


def test_models_that_cannot_be_vectorised() -> None:
    arguments = (Branching, TASK, DATA, subsets(20, 20), Training(epochs=1), [1, 2])
    with pytest.raises(BadModel, match="vectorised=False"):
        Ensemble.train(*arguments)
    assert len(Ensemble.train(*arguments, vectorised=False)) == 2


def test_bad_input() -> None:
    training = Training(epochs=1)
    with pytest.raises(BadSetting, match="one seed per member"):
        Ensemble.train(mlp, TASK, DATA, subsets(5, 5), training, [1])
    with pytest.raises(BadData, match="none for member 1"):
        Ensemble.train(mlp, TASK, DATA, subsets(5, 0), training, [1, 2])
    with pytest.raises(BadData, match=r"0\.\.299"):
        Ensemble.train(mlp, TASK, DATA, [torch.tensor([300])], training, [1])
    with pytest.raises(BadData, match="mask of shape"):
        Ensemble.train(mlp, TASK, DATA, torch.ones(2, 7, dtype=torch.bool), training, [1, 2])
    with pytest.raises(BadSetting, match="chunk"):
        Ensemble.train(mlp, TASK, DATA, subsets(5), training, [1], chunk=0)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Ensemble.train(conv, TASK, IMAGES, subsets(20, 20), Training(epochs=1), [1, 2])
    assert torch.equal(torch.rand(3), expected)


def test_table_holds_only_the_rows_in_use() -> None:
    table = Table(DATA, [torch.tensor([9, 3]), torch.tensor([3, 200])], torch.device("cpu"))
    assert table.ids.tolist() == [3, 9, 200]
    batch = table.fetch(table.positions(torch.tensor([200, 3])))
    assert batch.ids.tolist() == [200, 3] and torch.equal(batch["inputs"], DATA.columns["inputs"][[200, 3]])
