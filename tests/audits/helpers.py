"""A small real case for audits: digits with mislabelled points that a tiny network memorises, and an unseen half of the
same kind, so that a retrained model can tell neither from the other."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import nn

from expunge.cases.case import Case
from expunge.cases.data import TensorData
from expunge.cases.requests import samples

FORGET = 100


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int, epochs: int = 60) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    mover = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=rng).split(32):
            mover.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            mover.step()
    return model.eval()


@cache
def digits() -> dict:
    """case, original, retrained, second retrained; forget = 100 mislabelled rows, holdout = 100 mislabelled unseen
    rows."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=rng)
    x, clean = x[order], y[order]
    wrong = (clean + torch.randint(1, 10, clean.shape, generator=rng)) % 10
    y = clean.clone()
    y[:FORGET] = wrong[:FORGET]
    rows, unseen, test = slice(0, 400), slice(400, 500), slice(500, 900)
    case = Case(
        network(0),
        TensorData(inputs=x[rows], labels=y[rows], clean_labels=clean[rows]),
        samples(range(FORGET)),
        test=TensorData(inputs=x[test], labels=clean[test]),
        holdout=TensorData(inputs=x[unseen], labels=wrong[unseen]),
        build=lambda: network(torch.initial_seed() % 2**31),
    )
    keep = slice(FORGET, 400)
    return {
        "case": case,
        "original": train(network(1), x[rows], y[rows], 1),
        "retrained": train(network(2), x[keep], y[keep], 2),
        "floor": train(network(3), x[keep], y[keep], 3),
    }
