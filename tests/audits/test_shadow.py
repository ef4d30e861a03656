"""Shadow attacks on synthetic Gaussians whose best attack is known."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from expunge.audits.attacks import shadow
from expunge.audits.attacks.membership import auc
from expunge.errors import BadData, BadSetting

RNG = np.random.default_rng


def family(shift, models=64, examples=400, seed=0):
    """Margins (M, n) around example-specific centres, `shift` higher where the model holds the example."""
    rng = RNG(seed)
    centres = rng.normal(0, 5, examples)
    held = rng.random((models, examples)) < 0.5
    return centres + shift * held + rng.normal(0, 1, (models, examples)), held


def test_lira_comes_near_the_analytic_auc_where_a_plain_threshold_does_not():
    shift = 2.0
    margins, held = family(shift, models=257)
    scores = shadow.lira(margins[0], margins[1:], held[1:])
    best = norm.cdf(shift / math.sqrt(2))  # two unit Gaussians, one example each
    found = shadow.attack_quality(scores, held[0])
    assert found["auc"] == pytest.approx(best, abs=0.04)
    assert found["tpr_at_1pct_fpr"] <= found["auc"] and found["tpr_at_01pct_fpr"] <= found["tpr_at_1pct_fpr"]
    assert auc(margins[0][held[0]], margins[0][~held[0]]) < best - 0.2  # the examples' own difficulty hides it
    offline = shadow.attack_quality(shadow.lira(margins[0], margins[1:], held[1:], online=False), held[0])
    assert offline["auc"] == pytest.approx(best, abs=0.05)


def test_lira_log_ratio_by_hand():
    shadows = np.array([[0.0], [2.0], [10.0], [14.0]])
    held = np.array([[False], [False], [True], [True]])
    mean_out, std_out, mean_in, std_in = 1.0, math.sqrt(2), 12.0, math.sqrt(8)
    expected = norm.logpdf(9, mean_in, std_in) - norm.logpdf(9, mean_out, std_out)
    assert shadow.lira(np.array([9.0]), shadows, held)[0] == pytest.approx(expected)


def test_shared_deviation_pools_over_examples():
    margins = np.array([[0.0, 0.0], [2.0, 6.0]])
    mean, std = shadow.gaussians(margins, np.ones((2, 2), dtype=bool), shared=True)
    assert mean.tolist() == [1.0, 3.0] and std == pytest.approx([math.sqrt((2 + 18) / 2)] * 2)
    assert shadow.gaussians(margins, np.ones((2, 2), dtype=bool))[1] == pytest.approx([math.sqrt(2), math.sqrt(18)])


def test_lira_needs_both_kinds_and_matching_shapes():
    with pytest.raises(BadData, match="lack one kind"):
        shadow.lira(np.zeros(1), np.zeros((3, 1)), np.ones((3, 1), dtype=bool))
    with pytest.raises(BadData, match="same shape"):
        shadow.lira(np.zeros(2), np.zeros((3, 2)), np.ones((2, 2), dtype=bool))


def test_pairs_equal_the_slow_leave_one_out_loop():
    rng = RNG(1)
    u, r = 50 + rng.normal(1, 1, (6, 4)), 50 + rng.normal(0, 2, (6, 4))
    inside, outside = shadow.u_lira_pairs(u, r)
    for i in range(6):
        rest_u, rest_r = np.delete(u, i, 0), np.delete(r, i, 0)

        def ratio(value, rest_u=rest_u, rest_r=rest_r):
            top = norm.logpdf(value, rest_u.mean(0), rest_u.std(0, ddof=1))
            return top - norm.logpdf(value, rest_r.mean(0), rest_r.std(0, ddof=1))

        np.testing.assert_allclose(inside[i], ratio(u[i]), rtol=1e-7)
        np.testing.assert_allclose(outside[i], ratio(r[i]), rtol=1e-7)


def test_pairs_say_half_for_retrained_and_the_analytic_accuracy_for_shifted():
    rng = RNG(2)
    same = shadow.u_lira_pairs(rng.normal(0, 1, (100, 50)), rng.normal(0, 1, (100, 50)))
    assert shadow.u_lira_accuracy(*same) == pytest.approx(0.5, abs=0.05)
    shifted = shadow.u_lira_pairs(rng.normal(2, 1, (100, 50)), rng.normal(0, 1, (100, 50)))
    assert shadow.u_lira_accuracy(*shifted) == pytest.approx(norm.cdf(1), abs=0.02)
    constant = np.ones((5, 3))
    assert shadow.u_lira_accuracy(*shadow.u_lira_pairs(constant, constant)) == 0.5
    with pytest.raises(BadData, match="as many of one kind"):
        shadow.u_lira_pairs(np.zeros((5, 3)), np.zeros((4, 3)))


def test_general_u_lira_masks_caps_and_agrees_with_the_analytic_accuracy():
    rng = RNG(3)
    inside, outside = rng.normal(1, 1, (80, 300)), rng.normal(-1, 1, (500, 300))
    mask = rng.random((80, 300)) < 0.7
    inside[~mask] = 1e6  # must never be read
    forgotten = shadow.u_lira(rng.normal(1, 1, (4, 300)), inside, outside, mask, cap=40)
    unseen = shadow.u_lira(rng.normal(-1, 1, (4, 300)), inside, outside, mask, cap=40)
    assert forgotten.shape == (4, 300)
    assert shadow.u_lira_accuracy(forgotten, unseen) == pytest.approx(norm.cdf(1), abs=0.03)
    chosen = shadow._first(mask, np.minimum(mask.sum(0), 40), RNG(0))
    assert (chosen.sum(0) == 40).all() and not (chosen & ~mask).any()


def probabilities(margins):
    return 1 / (1 + np.exp(-margins))


def rmia_auc(shift, online, seed=0, references=4, n=600):
    """AUC of half the examples, `shift` higher under the target, against the other half."""
    rng = RNG(seed)
    centres, population = rng.normal(0, 2, n), rng.normal(0, 2, 500)
    member = np.arange(n) % 2 == 0
    target = centres + shift * member + rng.normal(0, 0.5, n)
    held = (rng.random((references, n)) < 0.5) if online else np.zeros((references, n), dtype=bool)
    if online:
        held[0], held[1] = True, False
    reference = centres + shift * held + rng.normal(0, 0.5, (references, n))
    z_target, z_reference = (population + rng.normal(0, 0.5, shape) for shape in ((500,), (references, 500)))
    scores = shadow.rmia(
        probabilities(target), probabilities(reference), probabilities(z_target), probabilities(z_reference),
        held if online else None,
    )  # fmt: skip
    assert ((scores >= 0) & (scores <= 1)).all()
    return auc(scores[member], scores[~member])


@pytest.mark.parametrize("online", [False, True])
def test_rmia_is_half_without_a_shift_and_high_with_one(online):
    assert rmia_auc(0.0, online) == pytest.approx(0.5, abs=0.06)
    assert rmia_auc(3.0, online) > 0.8


def test_rmia_by_hand():
    # p_x = ((1+.5)*.4 + .5)/2 = .55; ratio_x = .88/.55 = 1.6.  p_z = ((1.5)*(.2, .6) + .5)/2 = (.4, .7)
    # ratio_z = (.4/.4, 1.4/.7) = (1, 2): one of two lies below 1.6; with gamma = 2 none does (1.6/2 < 1)
    arguments = [np.array([[0.4]]), np.array([0.4, 1.4]), np.array([[0.2, 0.6]])]
    assert shadow.rmia(np.array([0.88]), *arguments, a=0.5)[0] == 0.5
    assert shadow.rmia(np.array([0.88]), *arguments, a=0.5, gamma=2.0)[0] == 0.0
    online = shadow.rmia(
        np.array([0.5]),
        np.array([[0.2], [0.6]]),
        np.array([0.1]),
        np.array([[0.2], [0.2]]),
        np.array([[False], [True]]),
    )
    assert online[0] == 1.0  # .5/.4 = 1.25 > .1/.2 = .5


def test_rmia_refuses_members_of_all_references_and_a_outside():
    with pytest.raises(BadData, match="excludes"):
        shadow.rmia(np.ones(1), np.ones((2, 1)), np.ones(3), np.ones((2, 3)), np.ones((2, 1), dtype=bool))
    with pytest.raises(BadSetting, match=r"\[0, 1\]"):
        shadow.rmia(np.ones(1), np.ones((2, 1)), np.ones(3), np.ones((2, 3)), a=2)


def test_tuned_a_is_in_the_grid_and_best_on_the_second_model():
    rng = RNG(5)
    centres = rng.normal(0, 2, 400)
    held = rng.random((4, 400)) < 0.5
    reference = probabilities(centres + 3 * held + rng.normal(0, 0.5, (4, 400)))
    population = probabilities(rng.normal(0, 2, 300) + rng.normal(0, 0.5, (4, 300)))
    a = shadow.tune_offline(reference, held, population)
    assert 0 <= a <= 1 and round(a * 10) == pytest.approx(a * 10)
    with pytest.raises(BadData, match="two reference models"):
        shadow.tune_offline(reference[:1], held[:1], population[:1])
