"""Forget sets: deterministic in their seed, and what they say they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from expunge import TensorData, requests
from expunge.cases import forget_sets
from expunge.errors import BadRequest
from toys import digits, mlp


def data() -> TensorData:
    x, y, *_ = digits(200)
    return TensorData(inputs=x, labels=y, user=torch.arange(200) // 20)


def test_random_is_a_function_of_its_seed():
    one, two, three = (forget_sets.random(data(), fraction=0.1, seed=s) for s in (0, 0, 1))
    assert one == two != three and len(one.rows(data())) == 20
    assert len(forget_sets.random(data(), count=7).rows(data())) == 7


@pytest.mark.parametrize("size", [{}, {"count": 1, "fraction": 0.1}, {"fraction": 1.0}, {"count": 0}, {"count": 201}])
def test_sizes_that_make_no_sense(size):
    with pytest.raises(BadRequest):
        forget_sets.random(data(), **size)


def test_class_and_group():
    assert forget_sets.by_class(3) == requests.label(3)
    group = forget_sets.by_group(data(), "user", seed=2)
    rows = group.rows(data())
    assert (
        group == forget_sets.by_group(data(), "user", seed=2)
        and len(rows) == 20
        and len(set((rows // 20).tolist())) == 1
    )
    assert forget_sets.by_group(data(), "user", 4).rows(data()).tolist() == list(range(80, 100))


def test_mislabelled_rows_are_wrong_and_only_they():
    table, request = forget_sets.mislabelled(data(), count=30, seed=1)
    wrong = table.column("labels") != data().column("labels")
    assert wrong.nonzero().squeeze(1).tolist() == request.rows(table).tolist() and wrong.sum() == 30
    assert torch.equal(table.column("clean_labels"), data().column("labels"))
    assert table.column("labels").min() >= 0 and table.column("labels").max() <= 9
    again, _ = forget_sets.mislabelled(data(), count=30, seed=1)
    assert torch.equal(again.column("labels"), table.column("labels"))


def test_highest_and_lowest_loss_equal_the_sorted_losses():
    model, table = mlp(), data()
    x, y = table.column("inputs"), table.column("labels")
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(x), y, reduction="none").double()
    high = forget_sets.highest_loss(table, model.train(), count=25).rows(table)
    low = forget_sets.lowest_loss(table, model, count=25).rows(table)
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[high] = False
    assert loss[high].min() >= loss[rest].max() and loss[low].max() <= loss[rest].quantile(0.2) and model.training
    assert len(high) == len(low) == 25 and not set(high.tolist()) & set(low.tolist())


def test_partly_identified_is_a_part():
    full = requests.label(3)
    part = forget_sets.partly_identified(full, data(), 0.5, seed=3)
    rows, all_rows = part.rows(data()).tolist(), full.rows(data()).tolist()
    assert set(rows) < set(all_rows) and len(rows) == round(0.5 * len(all_rows))
    assert part == forget_sets.partly_identified(full, data(), 0.5, seed=3)
