"""Named real data sets for benches, demos and tests: each cut into train and test in one fixed order.

    digits()          scikit-learn's 1,797 handwritten digits, 8 x 8             classification, 10 classes
    breast_cancer()   scikit-learn's 569 tumours, 30 measurements                 classification, 2 classes
    diabetes()        scikit-learn's 442 patients, 10 measurements                regression: progression after a year
    lastfm()          52,668 (user, artist, plays), from EXPUNGE_DATA             regression: log(1 + plays)
    cifar10()         60,000 pictures 3 x 32 x 32, from EXPUNGE_DATA or the hub   classification, 10 classes

Why Last.fm is the second regression set: it is real, large enough to memorise, its requests are natural (one user's
history), and plays can be predicted (user and artist effects alone explain about 0.7 of the variance on test pairs,
measured by ridge regression), while scikit-learn's other bundled targets are tiny (178 wines, 20 athletes).
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from expunge.cases.data import TensorData
from expunge.cases.loading import data_home, load_data
from expunge.errors import BadData, need_extra
from expunge.seeds import generator

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Dataset:
    """train, test: tables with inputs and labels. build: a small untrained net of the right shape, None where a bench
    brings its own. source: where the data are from, to be said beside numbers."""

    name: str
    task: str
    train: TensorData
    test: TensorData
    outputs: int
    source: str
    build: Callable[[], nn.Module] | None = None


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between."""
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class PairRegressor(nn.Module):
    """(B, 2) int64 (user, artist) -> (B,) value, by two embeddings and a small net."""

    def __init__(self, users: int, artists: int, width: int = 16):
        super().__init__()
        self.users, self.artists = nn.Embedding(users, width), nn.Embedding(artists, width)
        self.net = mlp(2 * width, (32,), 1)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.net(torch.cat([self.users(pairs[:, 0]), self.artists(pairs[:, 1])], 1)).squeeze(1)


def digits(train: int = 1000, pictures: bool = False) -> Dataset:
    """Inputs (N, 64), or (N, 1, 8, 8) with `pictures`, in 0..1."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    inputs = torch.tensor(x / 16, dtype=torch.float32)
    inputs = inputs.reshape(-1, 1, 8, 8) if pictures else inputs
    build = None if pictures else partial(mlp, 64, (256, 128), 10)
    return _cut("digits", "classification", inputs, torch.tensor(y, dtype=torch.int64), train, 10, build)


def breast_cancer(train: int = 400) -> Dataset:
    """Inputs (N, 30) standardised by the training rows; label 1 is benign."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    build = partial(mlp, 30, (64, 64), 2)
    return _cut(
        "breast_cancer", "classification", torch.tensor(x), torch.tensor(y, dtype=torch.int64), train, 2, build, True
    )


def diabetes(train: int = 340) -> Dataset:
    """Inputs (N, 10) standardised by the training rows; target 2.5..34.6: the original score over 10."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    target = torch.tensor(y / 10, dtype=torch.float32)
    return _cut("diabetes", "regression", torch.tensor(x), target, train, 1, partial(mlp, 10, (64, 64), 1), True)


def lastfm(root: str | os.PathLike[str] | None = None, train: int | None = None) -> Dataset:
    """Inputs (N, 2) int64 user and artist; target log(1 + plays). train: only the first rows of the training part."""
    folder = _home(root, "lastfm", "the HetRec 2011 Last.fm set as train.tsv and test.tsv of user, item, count")
    parts = []
    for name in ("train.tsv", "test.tsv"):
        with open(folder / name, newline="", encoding="utf-8") as file:
            table = np.array([[float(cell) for cell in row] for row in csv.reader(file, delimiter="\t")])
        parts.append(
            (torch.tensor(table[:, :2], dtype=torch.int64), torch.tensor(np.log1p(table[:, 2]), dtype=torch.float32))
        )
    (x, y), (x_test, y_test) = parts
    users, artists = (int(max(x[:, k].max(), x_test[:, k].max())) + 1 for k in (0, 1))
    data = TensorData(inputs=x[:train], labels=y[:train], user=x[:train, 0].clone())
    test = TensorData(inputs=x_test, labels=y_test, user=x_test[:, 0].clone())
    source = "HetRec 2011 Last.fm, non-commercial research"
    return Dataset("lastfm", "regression", data, test, 1, source, partial(PairRegressor, users, artists))


def cifar10(
    root: str | os.PathLike[str] | None = None,
    train: int | None = None,
    test: int | None = None,
    normalise: bool = True,
) -> Dataset:
    """Inputs (N, 3, 32, 32): float32 normalised by channel, or uint8. train, test: only that many rows of each part.

    root: a folder with the parquet files; default: cifar10 in EXPUNGE_DATA, else the hub's uoft-cs/cifar10.
    """
    home = data_home()
    local = Path(root) if root is not None else home / "cifar10" if home is not None else None
    tables = []
    for split, count in (("train", train), ("test", test)):
        if local is not None and local.is_dir():
            pixels, labels = _parquet_pictures(sorted(local.rglob(f"{split}-*.parquet")), count)
        else:
            dataset = load_data("uoft-cs/cifar10", split=split).dataset  # type: ignore[attr-defined]
            dataset = dataset.select(range(count)) if count is not None else dataset
            pixels = np.stack([np.asarray(row["inputs"]) for row in dataset]).transpose(0, 3, 1, 2)
            labels = list(dataset["labels"])
        inputs = torch.from_numpy(np.ascontiguousarray(pixels))
        if normalise:
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
            inputs = (inputs.float() / 255 - mean) / std
        tables.append(TensorData(inputs=inputs, labels=torch.tensor(labels)))
    return Dataset(
        "cifar10",
        "classification",
        tables[0],
        tables[1],
        10,
        "CIFAR-10 (Krizhevsky 2009); a local copy may be JPEG-encoded",
    )


DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits, "breast_cancer": breast_cancer, "diabetes": diabetes, "lastfm": lastfm, "cifar10": cifar10,
}  # fmt: skip


def _cut(
    name: str, task: str, inputs: Tensor, labels: Tensor, train: int, outputs: int,
    build: Callable[[], nn.Module] | None, standardise: bool = False,
) -> Dataset:  # fmt: skip
    """One fixed shuffled order; the first `train` rows are the training table."""
    if not 0 < train < len(inputs):
        raise BadData(
            f"expected between 1 and {len(inputs) - 1} training rows of {name}, found {train}; leave some for test"
        )
    order = torch.randperm(len(inputs), generator=generator(0, "datasets", name))
    x, y = inputs[order], labels[order]
    if standardise:
        x = ((x - x[:train].mean(0)) / x[:train].std(0)).float()
    source = f"scikit-learn's {name}"
    parts = [TensorData(inputs=x[rows], labels=y[rows]) for rows in (slice(None, train), slice(train, None))]
    return Dataset(name, task, parts[0], parts[1], outputs, source, build)


def _home(root: str | os.PathLike[str] | None, name: str, what: str) -> Path:
    home = data_home()
    folder = Path(root) if root is not None else home / name if home is not None else None
    if folder is None or not folder.is_dir():
        raise BadData(
            f"expected {what} in EXPUNGE_DATA/{name}, found no such folder; set EXPUNGE_DATA or pass root=folder"
        )
    return folder


def _parquet_pictures(files: list[Path], count: int | None) -> tuple[np.ndarray, list[int]]:
    """(N, 3, H, W) uint8 and labels of the first `count` rows of parquet files with encoded pictures."""
    parquet, image = need_extra("pyarrow.parquet", "huggingface"), need_extra("PIL.Image", "huggingface")
    if not files:
        raise BadData("expected parquet files named train-* and test-*, found none; check the folder")
    pictures: list[np.ndarray] = []
    labels: list[int] = []
    for file in files:
        for block in parquet.ParquetFile(file).iter_batches(batch_size=2000, columns=["img", "label"]):
            for row in block.to_pylist():
                if count is not None and len(labels) >= count:
                    return np.stack(pictures), labels
                with image.open(io.BytesIO(row["img"]["bytes"])) as picture:
                    pictures.append(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))
                labels.append(int(row["label"]))
    return np.stack(pictures), labels
