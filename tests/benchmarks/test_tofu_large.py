"""TOFU on 109 M parameters: what can be told without training it."""

from __future__ import annotations

import torch

from expunge.benchmarks.nano import llama
from expunge.benchmarks.tofu_large import METHODS, SHARED, SIZES, claimed
from expunge.methods import find


def test_the_model_has_more_than_a_hundred_million_parameters():
    size = SIZES["large"]
    with torch.device("meta"):
        model = llama(size.vocabulary, size.width, size.layers, size.heads)
    blocks = size.layers * (4 * size.width**2 + 3 * size.width * (8 * size.width // 3) + 2 * size.width)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == blocks + size.width * (size.vocabulary + 1) and counted > 1e8
    assert 20 * (size.keep + size.forget) == 4000 and 20 * size.forget == 400


def test_every_method_takes_the_shared_budget():
    assert len(METHODS) >= 8
    for name, own in METHODS.items():
        known = find(name).settings.model_fields
        values = find(name).configure(**{k: v for k, v in SHARED.items() if k in known} | own).values
        assert {k: values[k] for k in SHARED} == SHARED | {k: v for k, v in own.items() if k in SHARED}, name


def test_a_run_is_taken_by_one_process(tmp_path):
    kept = tmp_path / "npo-0.json"
    assert [claimed(kept), claimed(kept), claimed(tmp_path / "npo-1.json")] == [True, False, True]
