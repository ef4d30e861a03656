"""Amnesiac unlearning against sums made by hand."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from expunge import Case, Optimizer, TensorData, Training, protect, requests, unlearn
from expunge.engine import fit
from expunge.errors import UnmetNeed
from expunge.methods.protected.amnesiac import AmnesiacModel, flat
from toys import digits, mlp

RECIPE = Training(epochs=3, batch_size=20, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9))


def case(request) -> Case:
    x, y, x_test, y_test = digits(200)
    build = lambda: mlp(64, (16,))  # noqa: E731
    marked = torch.arange(200) < 10
    return Case(build(), TensorData(inputs=x, labels=y, marked=marked), request, recipe=RECIPE, build=build,
                test=TensorData(inputs=x_test, labels=y_test))  # fmt: skip


@cache
def logged(sensitive: str = "all") -> AmnesiacModel:
    return protect(case(requests.samples([4])), "amnesiac", seed=2, sensitive=sensitive)


def test_logging_does_not_change_the_training_and_the_log_adds_up():
    plain, model = fit(case(requests.samples([4])), "train", 2), logged()
    assert torch.equal(flat(plain), flat(model.model)) and model.updates.shape == (30, flat(plain).numel())
    start = flat(case(requests.samples([4])).fresh(2))
    assert torch.allclose(start + model.updates.sum(0), flat(plain), atol=1e-5)
    assert sorted(model.members[:10].reshape(-1).tolist()) == list(range(200))  # one epoch passes every row once


def test_taking_back_everything_gives_the_initial_weights():
    model = unlearn(
        case(requests.samples(range(199))).with_(model=logged()), "amnesiac", repair_epochs=0, floor=None
    ).model
    assert torch.allclose(flat(model.model), flat(case(requests.samples([4])).fresh(2)), atol=1e-5)


def test_taking_back_one_row_is_the_sum_of_its_batches_and_only_once():
    outcome = unlearn(case(requests.samples([4])).with_(model=logged()), "amnesiac", repair_epochs=0, floor=None)
    hit = (logged().members == 4).any(1)
    assert hit.sum() == 3 == outcome.record["notes"]["updates_taken_back"]
    assert torch.allclose(flat(outcome.model.model), flat(logged().model) - logged().updates[hit].sum(0), atol=1e-6)
    assert not outcome.model.updates[hit].any() and outcome.model.state_dict().keys() == logged().state_dict().keys()
    mate = next(r for r in logged().members[hit.nonzero()[0, 0]].tolist() if r != 4)
    second = unlearn(case(requests.samples([mate])).with_(model=outcome.model), "amnesiac", repair_epochs=0, floor=None)
    both = (logged().members == mate).any(1) & ~hit
    assert both.sum() < 3
    assert torch.allclose(
        flat(second.model.model), flat(outcome.model.model) - logged().updates[both].sum(0), atol=1e-6
    )


def test_repair_reads_live_retain_rows_only():
    first = unlearn(case(requests.samples([4])).with_(model=logged()), "amnesiac", floor=None).model
    request = case(requests.samples([9])).with_(model=first)
    second = unlearn(request, "amnesiac", seed=1, floor=None).model
    x = request.data.column("inputs").clone()
    x[[4, 9]] = 5.0  # forgotten rows may hold anything now
    other = unlearn(request.with_(data=request.data.replaced(inputs=x)), "amnesiac", seed=1, floor=None).model
    assert torch.equal(flat(second.model), flat(other.model))


def test_only_sensitive_rows_are_logged_and_others_are_refused():
    model = logged("marked")
    assert 0 < len(model.members) < 30
    assert all((row[row >= 0] < 10).any() for row in model.members)
    with pytest.raises(UnmetNeed, match="logged"):
        unlearn(case(requests.samples([50])).with_(model=model), "amnesiac")
    asked = logged("request")
    assert len(asked.members) == 3 and (asked.members == 4).any(1).all()
