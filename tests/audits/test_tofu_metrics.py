"""TOFU's metrics: the golden numbers of its published logs, and what each formula must do by hand."""

import json
import math
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from expunge.audits.metrics import tofu
from expunge.errors import BadData

DATA = os.environ.get("EXPUNGE_DATA")
logs = pytest.mark.skipif(DATA is None, reason="needs EXPUNGE_DATA (tofu_eval_logs)")
PARTS = {
    "retain": "eval_log.json", "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json", "forget": "eval_log_forget.json",
}  # fmt: skip


@cache
def log(name):
    """part -> losses of the answer, of the truth ratio's right answer and of the wrong ones, and ROUGE-L recall."""
    read = json.loads((Path(DATA) / "tofu_eval_logs" / f"{name}.json").read_text())
    columns = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
    return {part: [np.array(list(read[file][c].values())) for c in columns] for part, file in PARTS.items()}


def utility(name, ratio=tofu.truth_ratio_geometric):
    nine = []
    for part in ("retain", "real_authors", "world_facts"):
        answer, right, wrong, rouge = log(name)[part]
        known = tofu.probability(answer) if part == "retain" else tofu.normalised_probability(answer, wrong)
        nine += [known.mean(), rouge.mean(), tofu.true_better(ratio(right, wrong))]
    return tofu.model_utility(nine)


def ratios(name, ratio):
    _, right, wrong, _ = log(name)["forget"]
    return ratio(right, wrong)


@logs
@pytest.mark.data
@pytest.mark.parametrize(
    ("ratio", "distance", "p"),
    [(tofu.truth_ratio_geometric, "0.3467", "2.19427e-16"), (tofu.truth_ratio_arithmetic, None, "2.43113e-17")],
)
def test_forget_quality_of_phi_is_the_published_one(ratio, distance, p):
    full, retrained = ratios("phi_full", ratio), ratios("phi_retain90", ratio)
    d, found = tofu.kolmogorov_smirnov(full, retrained)
    assert f"{found:.5e}" == p and (distance is None or f"{d:.4f}" == distance)
    assert tofu.forget_quality(full, retrained) == pytest.approx(math.log10(float(p)), abs=1e-5)


@logs
@pytest.mark.data
def test_model_utility_of_phi_is_the_published_one():
    assert f"{utility('phi_full'):.6f}" == "0.522074" and f"{utility('phi_retain90'):.6f}" == "0.531991"
    assert abs(utility("phi_full", tofu.truth_ratio_arithmetic) - 0.522074) > 0.01  # the two ratios do not mix


@logs
@pytest.mark.data
def test_forget_truth_ratio_of_phi_is_the_published_one():
    found = [tofu.closer_to_1_better(ratios(name, tofu.truth_ratio_geometric)) for name in ("phi_full", "phi_retain90")]
    assert [f"{value:.4f}" for value in found] == ["0.4834", "0.6288"]


def test_formulas_by_hand():
    right, wrong = -np.log([0.5]), -np.log([[0.1, 0.4]])
    assert tofu.normalised_probability(right, wrong)[0] == pytest.approx(0.5)
    assert tofu.truth_ratio_geometric(right, wrong)[0] == pytest.approx(0.2 / 0.5)
    assert tofu.truth_ratio_arithmetic(right, wrong)[0] == pytest.approx(0.25 / 0.5)
    assert tofu.prob_mean(right, wrong) == pytest.approx(0.5 / 0.7)
    assert tofu.closer_to_1_better(np.array([0.5, 2.0, 1.0])) == pytest.approx(2 / 3)
    assert tofu.true_better(np.array([0.25, 3.0])) == pytest.approx(0.375)
    assert tofu.model_utility([0.5, 1.0]) == pytest.approx(2 / 3) and tofu.model_utility([0.9, 0.0]) == 0.0
    with pytest.raises(BadData, match="0 or more"):
        tofu.model_utility([0.5, -0.1])


def test_the_arithmetic_ratio_is_never_below_the_geometric_one():
    rng = np.random.default_rng(0)
    right, wrong = rng.exponential(2, 100), rng.exponential(2, (100, 5))
    assert (tofu.truth_ratio_arithmetic(right, wrong) >= tofu.truth_ratio_geometric(right, wrong)).all()


def test_forget_quality_is_the_same_for_a_ratio_and_its_inverse_and_has_a_floor():
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(0, 1, 200), rng.lognormal(0.2, 1, 200)
    assert tofu.forget_quality(a, b) == pytest.approx(tofu.forget_quality(1 / a, 1 / b))
    assert tofu.forget_quality(a, a) == 0.0
    # No overlap at all: the floor of 400 rows against 400, which tables show for every broken model.
    assert f"{10 ** tofu.forget_quality(np.arange(400.0), np.arange(400.0) + 1000):.2e}" == "1.06e-239"
    assert tofu.forget_quality(np.zeros(4000), np.ones(4000)) >= -324


def test_privleak_has_the_direction_of_the_card():
    # Forget rows stand out (AUC 1) while the retrained model cannot tell them: -100. Its own AUC: 0.
    assert tofu.privleak(1.0, 0.48) == pytest.approx(-100)
    assert tofu.privleak(0.48, 0.48) == 0.0
    # MUSE's printed bound for news: a = 0.4772 in its reversed orientation, so ours is 1 - a, and AUC 0 gives 109.6
    assert tofu.privleak(0.0, 1 - 0.4772) == pytest.approx(109.6, abs=0.1)
    assert tofu.privleak(0.0, 1 - 0.5393) == pytest.approx(85.4, abs=0.1)
