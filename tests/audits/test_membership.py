"""Membership attacks against hand-made truths, slow loops and a memorising network."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from expunge.audits import Subjects, run_checks
from expunge.audits.attacks import membership as rules
from expunge.errors import BadData
from expunge.tasks import Batch, Classification, Output

RNG = np.random.default_rng


def modified_entropy_by_hand(p, y):
    """Song and Mittal's formula as a loop."""
    total = -(1 - p[y]) * math.log(p[y])
    for i, value in enumerate(p):
        if i != y:
            total -= value * math.log(1 - value)
    return total


def official_modified_entropy(p, labels):
    """The bug: columns of every row are indexed by the whole label vector, and log p stands where log(1 - p)
    belongs."""
    log_p, reverse = -np.log(p), 1 - p
    changed, logs = p.copy(), log_p.copy()
    changed[:, labels], logs[:, labels] = reverse[:, labels], log_p[:, labels]
    return (changed * logs).sum(1)


def task_modified_entropy(p, labels):
    output = Output(torch.tensor(p).log())
    batch = Batch(torch.arange(len(p)), {"labels": torch.tensor(labels)})
    return -Classification().signals(output, batch)["modified_entropy"].numpy()


def test_modified_entropy_on_three_class_vectors_and_not_the_official_one():
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.05, 0.9, 0.05]])
    labels = np.array([0, 1, 1])
    truth = np.array([modified_entropy_by_hand(row, y) for row, y in zip(p, labels, strict=True)])
    # By hand for the first row: -.3 ln .7 - .2 ln .8 - .1 ln .9 = .1070 + .0446 + .0105
    assert truth[0] == pytest.approx(0.16217, abs=1e-4)
    np.testing.assert_allclose(task_modified_entropy(p, labels), truth, rtol=1e-9)
    assert np.abs(official_modified_entropy(p, labels) - truth).min() > 0.05


def test_modified_entropy_is_low_for_sure_and_right_high_for_sure_and_wrong():
    p = np.array([[0.999, 0.0005, 0.0005], [0.0005, 0.999, 0.0005], [1 / 3, 1 / 3, 1 / 3]])
    right, wrong, unsure = task_modified_entropy(p, np.array([0, 0, 0]))
    assert right < 0.01 < 1 < unsure < 5 < wrong


def test_auc_and_roc_agree_with_sklearn_with_ties():
    rng = RNG(0)
    members, others = rng.integers(0, 6, 40).astype(float), rng.integers(0, 5, 70).astype(float)
    truth = np.repeat([1, 0], [40, 70])
    scores = np.concatenate([members, others])
    assert rules.auc(members, others) == pytest.approx(roc_auc_score(truth, scores))
    fpr, tpr = rules.roc(members, others, None)
    expected_fpr, expected_tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    np.testing.assert_allclose(fpr, expected_fpr)
    np.testing.assert_allclose(tpr, expected_tpr)
    assert rules.auc(others, members) == pytest.approx(1 - rules.auc(members, others))


def test_tpr_at_fpr_by_hand_and_thinned_roc_keeps_its_ends():
    others = np.arange(100.0)
    assert rules.tpr_at_fpr(np.array([98.5, 99.5, 50.0, 10.0]), others, 0.01) == 0.5
    assert rules.tpr_at_fpr(np.array([98.5, 99.5, 50.0, 10.0]), others, 0.001) == 0.25
    fpr, tpr = rules.roc(np.arange(1000.0), np.arange(1000.0) + 0.5, 50)
    assert len(fpr) <= 50 and (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)


def test_auc_interval_is_wide_for_a_handful_and_ignores_order():
    few = rules.auc_interval(np.array([3.0, 4.0, 5.0]), np.array([0.0, 1.0, 2.0]), resamples=50)
    assert few[1] == 1.0 and few[0] < 0.85
    rng = RNG(1)
    members, others = rng.normal(1, 1, 200), rng.normal(0, 1, 200)
    many = rules.auc_interval(members, others)
    assert many[0] < norm.cdf(1 / math.sqrt(2)) < many[1] and many[1] - many[0] < 0.15
    assert many == rules.auc_interval(members[::-1], rng.permutation(others))


def test_class_thresholds_maximise_balanced_accuracy():
    rng = RNG(2)
    members, others = rng.normal(1, 1, 30), rng.normal(0, 1, 50)
    cut = rules.best_threshold(members, others)
    tries = np.linspace(-4, 5, 3000)
    slow = max((members >= t).mean() + (others < t).mean() for t in tries)
    assert (members >= cut).mean() + (others < cut).mean() >= slow - 1e-12
    cuts = rules.class_thresholds(np.array([1.0, 5.0]), np.array([0, 1]), np.array([0.0, 4.0]), np.array([0, 1]))
    scores, labels = np.array([1.0, 0.5, 4.5, 5.0, 4.9]), np.array([0, 0, 1, 1, 0])
    assert rules.called_members(scores, labels, cuts).tolist() == [True, False, False, True, True]


def test_svc_separates_separable_scores_and_not_equal_ones():
    rng = RNG(3)
    retain, test = rng.uniform(0.9, 1.0, 200), rng.uniform(0.1, 0.4, 80)
    assert rules.svc_nonmembers(retain, test, np.full(10, 0.95)).mean() == 0.0
    assert rules.svc_nonmembers(retain, test, np.full(10, 0.2)).mean() == 1.0
    assert rules.svc_privacy(retain, test) == 1.0
    same = rng.normal(0, 1, 600)
    assert rules.svc_privacy(same[:300], same[300:]) == pytest.approx(0.5, abs=0.1)
    assert rules.svc_members(retain, test, np.full(4, 0.95)).all()


def test_svc_takes_equal_class_sizes_whatever_the_order():
    members, others = rules.balanced_draw(np.arange(1000.0), np.arange(30.0), seed=0)
    assert len(members) == len(others) == 30 and len(np.unique(members)) == 30
    again, _ = rules.balanced_draw(np.arange(1000.0)[::-1], np.arange(30.0), seed=0)
    assert np.array_equal(members, again)
    assert not np.array_equal(members, rules.balanced_draw(np.arange(1000.0), np.arange(30.0), seed=1)[0])
    # With 20 members for each non-member an unbalanced SVC would call everybody a member of equal scores.
    rng = RNG(4)
    called = rules.svc_nonmembers(rng.normal(0, 1, 2000), rng.normal(0, 1, 100), rng.normal(0, 1, 500)).mean()
    assert 0.1 < called < 0.9


def test_logistic_attacks_on_shifted_and_on_equal_scores():
    rng = RNG(5)
    low, high = rng.normal(-3, 0.5, 100), rng.normal(3, 0.5, 400)
    assert rules.logistic_members(high, low, np.array([3.0, -3.0])).tolist() == [True, False]
    assert rules.cross_validated(low, high) == 1.0
    assert rules.cross_validated(rng.normal(0, 1, 500), rng.normal(0, 1, 500)) == pytest.approx(0.5, abs=0.06)
    assert 0 <= rules.cross_validated(np.array([0.0, 1.0]), np.array([2.0, 3.0])) <= 1
    with pytest.raises(BadData, match="at least 2"):
        rules.cross_validated(np.array([0.0]), np.array([1.0]))


def test_boosted_attack_reads_the_shape_of_sorted_probabilities():
    rng = RNG(6)

    def rows(n, top):
        rest = rng.dirichlet(np.ones(4), n) * (1 - top)
        found = np.concatenate([np.full((n, 1), top), rest], 1)
        return rng.permuted(found, axis=1)  # the classes' places must not matter

    assert rules.boosted_success(rows(200, 0.99), rows(200, 0.5), rows(50, 0.99)) > 0.95
    assert rules.boosted_success(rows(200, 0.99), rows(200, 0.5), rows(50, 0.5)) == pytest.approx(0.5, abs=0.05)


def test_empty_scores_are_an_error_with_a_remedy():
    with pytest.raises(BadData, match="give both splits some rows"):
        rules.auc(np.array([]), np.array([1.0]))


def test_membership_on_memorised_digits_and_not_on_the_retrained(audit):
    found = {row.name: row for row in run_checks(audit, ["membership"])}
    area = found["membership_auc"]
    assert area.original >= 0.8 and area.original == area.unlearned
    assert abs(area.retrained - 0.5) <= 0.1
    assert area.intervals["original"][0] > 0.7 and area.intervals["retrained"][0] < 0.5 < area.intervals["retrained"][1]
    assert area.floor == pytest.approx(abs(area.retrained - _second_auc(audit)))
    assert area.curves["original"]["tpr"][-1] == 1.0 and len(area.per_example["original"]) == 100


def _second_auc(audit):
    return rules.auc(audit.signal("floor", "forget", "margin"), audit.signal("floor", "holdout", "margin"))


def test_swapping_forget_and_holdout_mirrors_the_auc(audit):
    pair = audit.signal("original", "forget", "margin"), audit.signal("original", "holdout", "margin")
    assert rules.auc(*pair) - 0.5 == pytest.approx(-(rules.auc(*pair[::-1]) - 0.5))


def test_every_membership_check_runs_and_tells_original_from_retrained(audit):
    names = ["mia_efficacy", "mia_threshold", "mia_entropy", "mia_loss", "mia_boosted", "average_gap", "tow", "nomus"]
    found = {row.name: row for row in run_checks(audit, names)}
    for row in found.values():
        for subject in ("original", "unlearned", "retrained"):
            assert row.range[0] <= getattr(row, subject) <= row.range[1], (row.name, subject)
    # Memorised points keep a little less confidence than clean ones: the SVC calls them out, where the AUC does not.
    assert found["mia_efficacy"].original <= found["mia_efficacy"].retrained and found["mia_efficacy"].retrained > 0.9
    assert found["mia_loss"].original > 0.7 and found["mia_loss"].retrained == pytest.approx(0.5, abs=0.12)
    assert found["mia_threshold_correctness"].original > 0.9 > 0.1 > found["mia_threshold_correctness"].retrained
    assert (
        found["average_gap"].unlearned > 20 and found["average_gap"].floor < 6 and found["average_gap"].retrained == 0
    )
    gaps = [found[f"{name}_gap"].unlearned for name in ("ua", "ra", "ta", "mia")]
    assert found["average_gap"].unlearned == pytest.approx(np.mean(np.abs(gaps)))
    assert gaps[0] < 0 and found["tow"].retrained == 1 and found["tow"].unlearned < 0.3


def test_the_order_of_examples_changes_nothing(toy):
    from expunge.cases.data import Split

    def shuffled(name):
        split = toy["case"].split(name)
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(7))
        return Split(name, split.data, split.ids[order])

    plain, mixed = (
        Subjects(toy["case"], toy["original"], toy["original"], toy["retrained"], resamples=20) for _ in range(2)
    )
    splits = {name: shuffled(name) for name in ("forget", "retain", "test", "holdout")}
    names = list(splits)
    first = _numbers(plain, {name: name for name in names})
    second = _numbers(mixed, splits)
    assert first == pytest.approx(second)


def _numbers(subjects, splits):
    scores = {name: subjects.signal("original", split, "confidence") for name, split in splits.items()}
    entropy = {name: subjects.signal("original", split, "entropy") for name, split in splits.items()}
    loss = {name: subjects.losses("original", split) for name, split in splits.items()}
    return [
        rules.svc_nonmembers(scores["retain"], scores["test"], scores["forget"]).mean(),
        rules.svc_privacy(scores["retain"], scores["test"]),
        rules.cross_validated(loss["forget"], loss["holdout"]),
        rules.logistic_members(entropy["retain"], entropy["test"], entropy["forget"]).mean(),
        *rules.auc_interval(scores["forget"], scores["holdout"], resamples=20),
    ]
