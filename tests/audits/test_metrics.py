"""Metrics against numbers worked by hand, closed forms and identities."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from expunge.audits import Subjects, run_checks
from expunge.audits.metrics import challenge, combined, divergence, klom, regression, relearn, weights
from expunge.audits.metrics.accuracy import accuracy
from expunge.audits.metrics.intervals import bootstrap, widening, wilson
from expunge.cases.data import Split, TensorData
from expunge.tasks import Classification, Regression

RNG = np.random.default_rng
LOG2 = math.log(2)


def test_accuracy_by_hand():
    assert accuracy(np.array([1, 2, 3, 0]), np.array([1, 2, 0, 0])) == 0.75


def test_gaps_and_tug_of_war_by_hand():
    u, r = {"ua": 10.0, "ra": 90.0, "ta": 80.0, "mia": 50.0}, {"ua": 20.0, "ra": 98.0, "ta": 80.0, "mia": 48.0}
    assert combined.signed_gaps(u, r) == {"ua": -10, "ra": -8, "ta": 0, "mia": 2}
    assert combined.mean_gap(u, r) == 5.0
    accuracies = {"forget": 0.9, "retain": 0.8, "test": 0.7}
    assert combined.tug_of_war(accuracies, accuracies) == 1.0
    assert combined.tug_of_war(accuracies, {"forget": 0.4, "retain": 1.0, "test": 0.7}) == pytest.approx(0.5 * 0.8)


MUFAC = [
    (0.5951, 0.2136, 0.5839), (0.4880, 0.0445, 0.6995), (0.6055, 0.2129, 0.5898), (0.5900, 0.2126, 0.5824),
    (0.4048, 0.0485, 0.6539), (0.5893, 0.2089, 0.5858), (0.5925, 0.1990, 0.5972), (0.5984, 0.1415, 0.6577),
    (0.5633, 0.0953, 0.6863),
]  # fmt: skip


@pytest.mark.parametrize(("accuracy", "score", "published"), MUFAC)
def test_nomus_reproduces_the_published_table(accuracy, score, published):
    assert combined.nomus_score(accuracy, 0.5 + score) == pytest.approx(published, abs=1e-3)
    assert combined.nomus_score(accuracy, 0.5 - score) == pytest.approx(published, abs=1e-3)


def official_js(p, q):
    """bad teaching's metrics.py: KL(m || p) and KL(m || q), averaged over batch and classes."""
    m = (p + q) / 2
    return 0.5 * np.mean(m * np.log(m / p)) + 0.5 * np.mean(m * np.log(m / q))


def test_js_of_equal_disjoint_and_hand_made_distributions():
    p, q = np.array([[1.0, 0.0, 0.0]]), np.array([[0.0, 0.5, 0.5]])
    assert divergence.jensen_shannon(p, p)[0] == 0.0
    assert divergence.jensen_shannon(p, q)[0] == pytest.approx(LOG2)
    # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4): (ln 4/3 + (ln 2/3 + ln 2)/2) / 2
    a, b = np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])
    expected = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    assert divergence.jensen_shannon(a, b)[0] == pytest.approx(expected)
    assert divergence.jensen_shannon(a, b) == pytest.approx(divergence.jensen_shannon(b, a))


def test_js_is_not_the_official_formula():
    p, q = np.array([[0.98, 0.01, 0.01]]), np.array([[0.01, 0.01, 0.98]])
    true = divergence.jensen_shannon(p, q).mean()
    assert true > 0.9 * LOG2 and official_js(p, q) < 0.6 and abs(official_js(p, q) - true) > 0.05
    # Opposite answers must look forgotten to ZRF's scale, not close to 1.
    assert divergence.zero_retrain_forgetting(p, q) < 0.4
    assert divergence.zero_retrain_forgetting(p, p) == 1.0
    many = RNG(0).dirichlet(np.ones(100) * 0.05, (2, 50))
    assert 1 - official_js(many[0] + 1e-12, many[1] + 1e-12) > 0.9 > divergence.zero_retrain_forgetting(*many) + 0.2


def test_js_is_bounded_on_random_rows():
    p, q = RNG(1).dirichlet(np.ones(7) * 0.1, (2, 300))
    found = divergence.jensen_shannon(p, q)
    assert found.shape == (300,) and (found >= 0).all() and (found <= LOG2).all()


def test_activation_distance_by_hand():
    p, q = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.0, 1.0], [0.5, 0.5]])
    assert divergence.activation_distance(p, q) == pytest.approx([math.sqrt(2), 0.0])


def test_weight_distances_by_hand():
    a = {"one.weight": torch.tensor([1.0, 2.0]), "one.bias": torch.tensor([0.0]), "two.weight": torch.tensor([3.0])}
    b = {"one.weight": torch.tensor([1.0, 5.0]), "one.bias": torch.tensor([4.0]), "two.weight": torch.tensor([3.0])}
    assert weights.layer_distances(a, b) == {"one": 5.0, "two": 0.0} and weights.weight_distance(a, b) == 5.0
    assert weights.relative_difference(a, a) == 0.0
    assert weights.relative_difference(a, b) == 1.0  # the bias: |0 - 4| / 4
    assert weights.relative_difference(a, {"one.weight": a["one.weight"]}) == math.inf


def test_klom_of_equal_separate_and_hand_made_margins():
    rng = RNG(2)
    u, o = rng.normal(0, 1, (100, 30)), rng.normal(0, 1, (100, 30))
    assert (klom.margin_divergence(u, u) == 0).all()
    same = klom.margin_divergence(u, o)
    assert 0.15 < same.mean() < 0.7  # the floor of independent oracles, never 0 (the card measured .35)
    assert klom.margin_divergence(0.01 * u + 50, o).mean() == pytest.approx(math.log(1e5), rel=1e-6)
    # Two bins: u = 1/4, 3/4 and o = 1/2, 1/2, and the largest margin is counted
    two = klom.margin_divergence(np.array([[0.0], [1.0], [1.0], [1.0]]), np.array([[0.0], [0.0], [1.0], [1.0]]), bins=2)
    assert two[0] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert klom.margin_divergence(np.full((3, 1), 500.0), np.full((3, 1), 200.0))[0] == 0.0  # both clipped to 100


def test_klom_takes_unlearned_against_oracle():
    wide, narrow = np.array([[0.0], [10.0]]), np.array([[0.0], [0.1]])
    assert klom.margin_divergence(narrow, wide, 20)[0] == pytest.approx(math.log(2))
    assert klom.margin_divergence(wide, narrow, 20)[0] == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5e5))


def test_h_halves_with_every_half_epsilon_until_the_limit():
    found = challenge.halving(np.array([0.0, 0.49, 0.5, 0.99, 1.0, 2.5, 6.99, 7.0, 50.0]), models=512)
    assert found.tolist() == [1, 1, 0.5, 0.5, 0.25, 2**-5, 2**-13, 0, 0]
    assert challenge.halving(np.array([3.9, 4.6]), models=64)[0] == 2**-7  # ceil(log 63) = 5


def test_epsilon_from_rates_by_hand():
    rates = np.array([0.1, 0.0, 0.4]), np.array([0.2, 0.3, 0.4])
    expected = math.log(1 - 1e-5 - 0.2) - math.log(0.1)  # the second rule has one zero and is discarded
    assert challenge.rates_to_epsilon(*rates) == pytest.approx(expected)
    assert challenge.rates_to_epsilon(np.array([0.0, 0.3]), np.array([0.0, 0.3])) == challenge.CAP
    assert challenge.rates_to_epsilon(np.array([0.6]), np.array([0.6])) == 0.0


def test_example_epsilon_at_its_extremes():
    rng = RNG(3)
    u = rng.normal(0, 1, 100)
    assert challenge.example_epsilon(u, u + 100) == challenge.CAP
    assert challenge.example_epsilon(u, np.zeros(100) + 1e-4 * u) == challenge.CAP  # narrower than 1% of the other
    assert challenge.example_epsilon(np.ones(5), np.ones(5)) == 0.0
    assert challenge.example_epsilon(np.ones(5), np.zeros(5)) == challenge.CAP
    assert challenge.example_epsilon(u, u) < 0.8
    # A peaky sample in the middle of a wide one: no single cut tells them, two cuts do.
    assert challenge.example_epsilon(rng.normal(0, 0.2, 100), rng.normal(0, 4, 100)) > 2


def slow_epsilon(u, r):
    """All single cuts by a loop over the same grid."""
    positive, negative = (r, u) if np.median(r) > np.median(u) else (u, r)
    low, high = min(u.min(), r.min()), max(u.max(), r.max())
    best = 0.0
    for cut in np.linspace(low, high, math.ceil((high - low) * 100)):
        fpr, fnr = (negative >= cut).mean(), (positive < cut).mean()
        if fpr > 0 and fnr > 0:
            with np.errstate(all="ignore"):
                best = max(
                    best, np.nan_to_num(np.log(1 - 1e-5 - fpr) - np.log(fnr), nan=0),
                    np.nan_to_num(np.log(1 - 1e-5 - fnr) - np.log(fpr), nan=0),
                )  # fmt: skip
    return best


def test_one_cut_family_equals_the_slow_loop():
    rng = RNG(4)
    u, r = rng.normal(0, 1, 40), rng.normal(0.5, 1, 40)
    fpr, fnr = challenge._one_cut(np.sort(u), np.sort(r), 100)
    assert challenge.rates_to_epsilon(fpr, fnr) == pytest.approx(slow_epsilon(u, r))


def test_two_cut_rates_equal_counting():
    rng = RNG(5)
    u, r = np.sort(rng.normal(0, 1, 15)), np.sort(rng.normal(0, 3, 15))
    fpr, fnr = challenge._two_cuts(u, r, 5)
    count, width = 20, np.ptp(u)
    right = np.linspace(u.max() - 2, u.max() + 2, count)
    expected = []
    for b in right:
        for a in b - width + np.linspace(-2, 2, count):
            expected.append((((r >= a) & (r <= b)).mean(), 1 - ((u >= a) & (u <= b)).mean()))
    np.testing.assert_allclose(np.stack([fpr, fnr], 1), expected, atol=1e-12)


def test_quality_of_retrained_is_the_ceiling_far_above_that_of_the_original():
    rng = RNG(6)
    retrained, second, original = (rng.normal(shift, 1, (64, 12)) for shift in (0, 0, 6))
    ceiling = challenge.forgetting_quality(second, retrained)[0]
    assert 0.03 < ceiling < 0.6
    assert challenge.forgetting_quality(original, retrained)[0] < 0.2 * ceiling
    assert challenge.final_score(0.5, 0.9, 1.0, 0.8, 0.9) == pytest.approx(0.5 * 0.9 * 0.8 / 0.9)


def line(slope=0.0):
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(slope)
    return model


def relearn_steps(model, **changes):
    """One full-batch SGD step on y = x over x = 1 moves w to w + 2 lr (1 - w): after k steps 1 - w = (1 - 2 lr)^k."""
    task = Regression(error="mse")
    data = TensorData(inputs=torch.ones(8, 1), labels=torch.ones(8, 1))
    split = Split("train", data, torch.arange(8))

    def reached(model):
        return relearn.mean_loss(model, task, split) <= 0.01

    settings = {"optimizer": "sgd", "lr": 0.1, "batch_size": 8} | changes
    return relearn.steps_to_reach(model, task, split, reached, **settings)


def test_relearn_time_in_closed_form_and_the_model_is_left_alone():
    model = line()
    before = copy.deepcopy(model.state_dict())
    # .8^k <= .1 (the loss is its square) first at k = 11
    assert relearn_steps(model) == 11 and relearn_steps(model) == 11
    assert torch.equal(before["weight"], model.weight)
    assert relearn_steps(model, every=5) == 15
    assert relearn_steps(line(1.0)) == 0
    assert relearn_steps(model, max_steps=10) is None and relearn_steps(model, max_steps=11) == 11


def test_relearning_is_equal_for_equal_seeds_with_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    data = TensorData(inputs=torch.randn(60, 4), labels=torch.randint(0, 3, (60,)))
    split, task, seen = Split("train", data, torch.arange(60)), Classification(), []
    for seed in (1, 1, 2):
        losses = []
        torch.manual_seed(len(seen))  # what others drew must not matter

        def reached(model, losses=losses):
            losses.append(relearn.mean_loss(model, task, split))
            return False

        assert relearn.steps_to_reach(model, task, split, reached, seed=seed, batch_size=16, max_steps=6) is None
        seen.append(losses)
    assert seen[0] == seen[1] != seen[2]


def test_anamnesis_index_by_hand():
    assert relearn.anamnesis_index(20, 20, 100) == (1.0, "")
    assert relearn.anamnesis_index(5, 20, 100)[0] == 0.25
    assert (
        relearn.anamnesis_index(None, 50, 100)[0] == 2.0 and "not reached" in relearn.anamnesis_index(None, 50, 100)[1]
    )
    assert relearn.anamnesis_index(0, 0, 100)[0] == 1.0 and relearn.anamnesis_index(3, 0, 100)[0] == math.inf


def test_ain_is_one_for_identical_models_and_small_for_the_original(toy):
    retrained = toy["retrained"]
    same = Subjects(toy["case"], toy["original"], copy.deepcopy(retrained), retrained)
    row = run_checks(same, ["ain"], {"ain": {"lr": 0.01, "every": 4, "max_steps": 200}})[0]
    assert row.unlearned == 1.0 and row.retrained == 1.0 and row.original == 0.0


def test_wasserstein_in_closed_form():
    a = RNG(7).normal(0, 1, 50)
    assert regression.prediction_distance(a, a) == 0.0
    assert regression.prediction_distance(a, a + 3) == pytest.approx(3.0)
    b = RNG(8).normal(0, 2, 50)
    assert regression.prediction_distance(a, b) == pytest.approx(np.abs(np.sort(a) - np.sort(b)).mean())
    assert regression.prediction_distance(np.stack([a, a], 1), np.stack([a, a + 2], 1)) == pytest.approx(1.0)


def test_relative_gaps_by_hand():
    found = regression.relative_gaps(np.array([1.0, 2.0, 5.0]), np.array([2.0, 2.0, 1.0]), np.array([2.0, 4.0, 0.0]))
    assert found[:2].tolist() == [0.5, 0.0] and np.isnan(found[2])


def test_bootstrap_covers_and_widens_for_a_handful():
    hits = 0
    for seed in range(60):
        low, high = bootstrap((RNG(seed).normal(0, 1, 8),), seed=seed, resamples=200)
        hits += low <= 0 <= high
    assert hits >= 52  # 95% of 60 is 57, less three standard deviations of chance
    assert bootstrap((np.array([1.0]),)) == (-math.inf, math.inf)
    assert widening(1) == math.inf and widening(2) > 9 and widening(10_000) == pytest.approx(1, abs=1e-3)
    values = RNG(9).normal(0, 1, 30)
    assert bootstrap((values,)) == bootstrap((values[::-1],))


def test_large_means_take_the_normal_limit():
    values = RNG(10).normal(5, 2, 6000)
    low, high = bootstrap((values,))
    assert (low + high) / 2 == pytest.approx(values.mean()) and high - low == pytest.approx(
        2 * 1.96 * 2 / 6000**0.5, rel=0.05
    )


def test_wilson_by_hand_and_never_without_width():
    low, high = wilson(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert wilson(1.0, 4)[0] < 0.52 and wilson(1.0, 4)[1] == 1.0
