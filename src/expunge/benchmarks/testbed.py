"""The cases that the demo and the tables share: models, data and requests on real data.

Digits are trained on few rows on purpose: forgetting can only be measured where the model knows its training rows better than
unseen ones. With all 1,797 digits a small network generalises so well that original and retrained agree on a random forget
set, and there is nothing to take out; with 600 rows, 60 of them mislabelled, the original gives the wrong labels it has
memorised and the retrained model gives the right ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from expunge.cases import Case, TensorData, requests
from expunge.cases.datasets import lastfm, mlp
from expunge.cases.loading import load_data
from expunge.engine import fit
from expunge.parts.plan import Optimizer, Training
from expunge.seeds import generator
from expunge.tasks import Regression
from expunge.tasks.base import Batch


class DigitsNet(nn.Module):
    """Two convolutions and two linear layers on (B, 1, 8, 8) in 0..1; 46,650 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.hidden = nn.Linear(512, 80)
        self.classifier = nn.Linear(80, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classifier(self.hidden(self.features(inputs).flatten(1)).relu())


class ResNet8(nn.Module):
    """A small residual network with batch norm for (B, 3, 32, 32): three stages of one block, widths 12, 24, 48."""

    def __init__(self, width: int = 12, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(inputs)).mean((2, 3)))


class Block(nn.Module):
    """conv-bn-relu-conv-bn plus the input (through a 1x1 convolution where shapes differ)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        same = stride == 1 and inside == outside
        self.side = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
        )  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.body(inputs) + self.side(inputs)).relu()


class ResNet18(nn.Module):
    """The residual network of 18 layers with a stem for (B, 3, 32, 32), as unlearning papers use it; 11.2 million parameters."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(*(
            nn.Sequential(Block(a, b, 1 if a == b else 2), Block(b, b, 1)) for a, b in zip(widths, widths[1:], strict=False)
        ))  # fmt: skip
        self.classifier = nn.Linear(8 * width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(inputs)).mean((2, 3)))


def digits(train: int = 600) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 real digits in one fixed shuffled order: images (N, 1, 8, 8) in 0..1 and labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=generator(0, "digits"))
    images = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)[order]
    labels = torch.tensor(y, dtype=torch.int64)[order]
    return images[:train], labels[:train], images[train:], labels[train:]


def with_wrong_labels(labels: Tensor, count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(labels with `count` of them wrong, the rows that are)."""
    rows = torch.randperm(len(labels), generator=generator(seed, "mislabelled"))[:count].sort().values
    wrong = labels.clone()
    wrong[rows] = (labels[rows] + torch.randint(1, classes, (count,), generator=generator(seed, "wrong"))) % classes
    return wrong, rows


DIGITS_RECIPE = Training(epochs=60, batch_size=64, optimizer=Optimizer("sgd", lr=0.1, momentum=0.9, schedule="cosine"))


def digits_cases(seed: int = 0, train: int = 600, wrong: int = 60, which: str = "both") -> dict[str, Case]:
    """Two requests to one trained model: its memorised mislabelled rows ("memorised"), and one whole class ("class").

    The class request is made to a model trained on clean labels when asked for alone; in the demo both go to the same one.
    """
    x, y, x_test, y_test = digits(train)
    labels, rows = with_wrong_labels(y, wrong if which != "class" else 0, 10)
    data = TensorData(inputs=x, labels=labels, clean_labels=y)
    test = TensorData(inputs=x_test, labels=y_test)
    case = Case(
        DigitsNet(), data, requests.label(3), test=test, recipe=DIGITS_RECIPE, build=DigitsNet, name="digits-class"
    )
    case = case.with_(model=fit(case, "train", seed))
    cases = {"class": case}
    if which != "class":
        cases = {"memorised": memorised(case, rows, "digits-memorised"), **cases}
    return cases if which == "both" else {which: cases[which]}


def memorised(case: Case, rows: Tensor, name: str) -> Case:
    """The request for mislabelled rows. Its holdout must be of the same kind: unseen images, mislabelled the same way; a
    clean holdout would make every wrong label look like a member."""
    x, y = case.test.column("inputs"), case.test.column("labels")
    half = len(y) // 2
    wrong, _ = with_wrong_labels(y[:half], half, int(y.max()) + 1, seed=1)
    return case.with_(
        request=requests.samples(rows.tolist()), holdout=TensorData(inputs=x[:half], labels=wrong),
        test=TensorData(inputs=x[half:], labels=y[half:]), name=name,
    )  # fmt: skip


CIFAR_ROWS, CIFAR_TEST = 1500, 1500
CIFAR_RECIPE = Training(
    epochs=80, batch_size=128, optimizer=Optimizer("sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine")
)


@cache
def cifar(train: int = CIFAR_ROWS, test: int = CIFAR_TEST, first: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of CIFAR-10 from number `first` on (rows are shuffled on disk), JPEG-decoded, standardised with the subset's own
    mean and std."""
    parts = []
    for split, count in (("train", train), ("test", test)):
        table = load_data("cifar10", split=split)
        rows = table.fetch(torch.arange(first, first + count))
        parts.append((rows["inputs"].float(), rows["labels"].long()))
    (x, y), (x_test, y_test) = parts
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return (x - mean) / std, y, (x_test - mean) / std, y_test


def shifted_or_mirrored(batch: Batch, rng: torch.Generator) -> Batch:
    """Pictures (B, 3, H, W) shifted by up to four pixels each way, zeros coming in, and mirrored in four cases
    of nine."""
    x = batch["inputs"]
    count, _, height, width = x.shape
    down, right, mirrored = torch.randint(0, 9, (3, count), generator=rng).to(x.device)[:, :, None]
    rows = down + torch.arange(height, device=x.device)
    columns = right + torch.arange(width, device=x.device)
    columns = torch.where(mirrored % 2 == 1, columns.flip(1), columns)
    one = torch.arange(count, device=x.device)[:, None, None]
    moved = nn.functional.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)[one, rows[:, :, None], columns[:, None, :]]
    return batch.with_columns(inputs=moved.permute(0, 3, 1, 2).contiguous())


def cifar_case(
    seed: int = 0, kind: str = "class", train: int = CIFAR_ROWS, recipe: Training = CIFAR_RECIPE, first: int = 0,
    build: Callable[[], nn.Module] = ResNet8, device: str = "cpu", augment: Callable[..., Batch] | None = None,
) -> Case:  # fmt: skip
    """A small ResNet on a CIFAR-10 subset, trained to fit it; the request is class 3 (cat) or 5% mislabelled rows."""
    x, y, x_test, y_test = cifar(train, first=first)
    labels, rows = with_wrong_labels(y, train // 20 if kind == "memorised" else 0, 10)
    data = TensorData(inputs=x.to(device), labels=labels, clean_labels=y)  # pictures where the model is, labels here
    test = TensorData(inputs=x_test.to(device), labels=y_test)
    case = Case(build().to(device), data, requests.label(3), test=test, recipe=recipe, build=build, augment=augment,
                name="cifar10-class")  # fmt: skip
    case = case.with_(model=fit(case, "train", seed))
    return memorised(case, rows, "cifar10-memorised") if kind == "memorised" else case


def diabetes_case(seed: int = 0) -> Case:
    """scikit-learn's diabetes (442 rows): forget the rows with y/10 < 8; MLP 10-64-64-1 with L1 loss (card's setting)."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    order = torch.randperm(len(x), generator=generator(0, "diabetes"))
    inputs = torch.tensor(x / x.std(0), dtype=torch.float32)[order]
    targets = torch.tensor(y / 10, dtype=torch.float32)[order]
    return regression_case("diabetes", inputs, targets, 340, 8.0, seed)


def regression_case(
    name: str, inputs: Tensor, targets: Tensor, train: int, below: float, seed: int, epochs: int = 40
) -> Case:
    """Forget a range of targets from an MLP regressor (d-64-64-1, L1 loss, Adam 3e-3)."""
    build = partial(mlp, inputs.shape[1], (64, 64), 1)
    recipe = Training(epochs=epochs, batch_size=32, optimizer=Optimizer("adam", lr=3e-3))
    case = Case(build(), TensorData(inputs=inputs[:train], labels=targets[:train]), requests.where("labels", "<", below),
                test=TensorData(inputs=inputs[train:], labels=targets[train:]), task=Regression(error="l1"), recipe=recipe,
                build=build, name=name)  # fmt: skip
    return case.with_(model=fit(case, "train", seed))


def lastfm_case(seed: int = 0, train: int = 1500, test: int = 800) -> Case:
    """HetRec Last.fm: how often a user played an artist, log(1 + plays); forget the rarely played (the lowest fifth or so).

    Four inputs, each without the row itself: the user's and the artist's mean log plays over the other rows, and how many rows
    each has (log). The rows are real; a table that two columns of ids would need embeddings for becomes one for an MLP.
    """
    table = lastfm().train
    user, artist = table.column("inputs").T
    plays = table.column("labels")
    columns = []
    for who in (user, artist):
        count = torch.zeros(int(who.max()) + 1).index_add_(0, who, torch.ones(len(who)))[who]
        total = torch.zeros(int(who.max()) + 1).index_add_(0, who, plays)[who]
        others = (total - plays) / (count - 1).clamp_min(1)
        columns += [torch.where(count > 1, others, plays.mean()), count.log()]
    inputs = torch.stack(columns, 1)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    rows = torch.randperm(len(plays), generator=generator(0, "lastfm"))[: train + test]
    return regression_case("lastfm", inputs[rows], plays[rows], train, 4.0, seed, epochs=40)
