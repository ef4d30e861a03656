"""The cost bench's own side runs as it is told; the peer's loads from a checkout and says what is missing."""

from __future__ import annotations

import copy

import pytest
import torch

from expunge.benchmarks.language_cost import SIZES, llama, ours, per_step, rows
from expunge.benchmarks.peer import Rows, peer_modules
from expunge.errors import BadSetting


@pytest.mark.parametrize("adapters", [False, True])
def test_a_tick_per_step_and_a_changed_model(adapters):
    model = llama(SIZES["tiny"])
    before = copy.deepcopy(model.state_dict())
    ticks = ours("npo", SIZES["tiny"], model, steps=4, adapters=adapters)
    assert len(ticks) == 1 + 4 and ticks == sorted(ticks) and per_step(ticks) > 0
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_missing_checkout_is_told(tmp_path):
    with pytest.raises(BadSetting, match="expected a checkout of open-unlearning"):
        peer_modules(tmp_path, "trainer.unlearn.npo")


def test_the_peer_gets_the_same_rows():
    data = rows(SIZES["tiny"])
    item, batch = Rows(data, [3])[0], data.fetch(torch.tensor([3]))
    assert torch.equal(item["input_ids"], batch["input_ids"][0]) and torch.equal(item["labels"], batch["labels"][0])
