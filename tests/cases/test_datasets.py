"""Named data sets: shapes, fixed order, no row in both parts. Those of EXPUNGE_DATA run where it is set."""

from __future__ import annotations

import os

import pytest
import torch

from expunge import Case, requests
from expunge.cases import datasets
from expunge.errors import BadData

HERE = pytest.mark.skipif(not os.environ.get("EXPUNGE_DATA"), reason="EXPUNGE_DATA is not set")


@pytest.mark.parametrize(("name", "shape"), [("digits", (64,)), ("breast_cancer", (30,)), ("diabetes", (10,))])
def test_bundled_sets_make_a_case(name, shape):
    data = datasets.DATASETS[name](train=300)
    again = datasets.DATASETS[name](train=300)
    assert data.train.column("inputs").shape == (300, *shape) and data.train.fingerprint() == again.train.fingerprint()
    assert not set(data.train.row_digests(range(300))) & set(data.test.row_digests(range(len(data.test))))
    case = Case(data.build(), data.train, requests.samples([1, 2]), task=data.task, test=data.test, build=data.build)
    assert len(case.split("retain")) == 298
    if name != "digits":
        assert torch.allclose(data.train.column("inputs").mean(0), torch.zeros(shape), atol=1e-4)


def test_sizes_and_missing_folders(monkeypatch, tmp_path):
    with pytest.raises(BadData, match="found 1797"):
        datasets.digits(train=1797)
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path))
    with pytest.raises(BadData, match="EXPUNGE_DATA/lastfm"):
        datasets.lastfm()


@HERE
@pytest.mark.data
def test_lastfm_requests_are_users():
    data = datasets.lastfm()
    case = Case(
        data.build(), data.train, requests.where("user", "==", 100), task=data.task, test=data.test, build=data.build
    )
    assert len(data.train) == 42135 and 5 < len(case.split("forget")) < 60
    assert set(case.split("holdout").data.column("user")[case.split("holdout").ids].tolist()) == {100}


@HERE
@pytest.mark.data
def test_cifar10_is_normalised():
    data = datasets.cifar10(train=500, test=20)
    x = data.train.column("inputs")
    assert (
        x.shape == (500, 3, 32, 32) and x.mean((0, 2, 3)).abs().max() < 0.1 and (x.std((0, 2, 3)) - 1).abs().max() < 0.1
    )
    raw = datasets.cifar10(train=2, test=2, normalise=False).train.column("inputs")
    assert (
        raw.dtype == torch.uint8
        and len(data.test) == 20
        and data.train.column("labels").unique().tolist() == list(range(10))
    )
