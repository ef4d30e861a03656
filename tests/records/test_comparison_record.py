"""Means and t-intervals over seeds, checked by hand; cases that must not be mixed."""

from __future__ import annotations

import math

import pytest

from expunge.errors import BadData
from expunge.records.comparison import Comparison, t_summary
from expunge.records.results import Results
from record_fixtures import results, results_dict


def three_runs(values, method="salun"):
    runs = []
    for seed, value in enumerate(values):
        data = results_dict(method, seed, plots=False, noise=False)
        data["measurements"][0]["unlearned"] = value
        data["measurements"][0]["retrained"] = 0.5
        data["measurements"][0]["intervals"] = {}
        runs.append(Results.from_dict(data))
    return runs


def test_interval_by_hand():
    """1, 2, 6: mean 3, s = sqrt((4 + 1 + 9) / 2) = sqrt(7), t(0.975, 2) = 4.302653 (tables): half = 6.572548."""
    row = Comparison.of(three_runs([1.0, 2.0, 6.0])).rows()[0]
    found = row.values["forgetting", "forget_score", "forget"]
    half = 4.302652729911275 * math.sqrt(7) / math.sqrt(3)
    assert half == pytest.approx(6.5725, abs=1e-4)
    assert (found["unlearned"].mean, found["unlearned"].n) == (3.0, 3)
    assert found["unlearned"].low == pytest.approx(3 - half, abs=1e-9)
    assert found["unlearned"].high == pytest.approx(3 + half, abs=1e-9)
    assert found["gap"].mean == pytest.approx(2.5) and found["gap"].high == pytest.approx(2.5 + half)


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062047364), (5, 2.7764451052), (31, 2.0422724563)])
def test_interval_against_a_table_of_t(n, t):
    values = [float(i) for i in range(n)]
    deviation = math.sqrt(sum((v - (n - 1) / 2) ** 2 for v in values) / (n - 1))
    found = t_summary(values)
    assert found.high - found.mean == pytest.approx(t * deviation / math.sqrt(n), rel=1e-9)


def test_one_seed_has_no_interval_and_equal_seeds_have_width_zero():
    assert t_summary([0.7]).model_dump() == {"mean": 0.7, "low": None, "high": None, "n": 1}
    same = t_summary([0.1] * 3)
    assert same.low == same.high == same.mean == 0.1
    assert t_summary([None, math.nan]) is None and t_summary([None, 2.0]).n == 1


def test_reference_counts_once_for_each_training_seed():
    """Nine methods beside the same three retrained models are three observations of retrained, not twenty-seven."""
    runs = [results(method, seed) for method in ("salun", "scrub", "ssd") for seed in range(3)]
    shared = Comparison.of(runs).shared("retrained")["forgetting", "forget_score", "forget"]
    by_seed = [results("salun", seed).find("forget_score").retrained for seed in range(3)]
    assert shared.n == 3 and shared.mean == pytest.approx(sum(by_seed) / 3)


def test_golds_of_their_own_seed_count_even_where_the_original_is_one():
    """One original, audited against golds of three seeds: three observations of retrained."""
    runs = []
    for seed in range(3):
        data = results_dict("salun", seed, plots=False)
        data["seeds"] = {"training": None, "unlearning": seed, "audit": seed}
        runs.append(Results.from_dict(data))
    assert Comparison.of(runs).shared("retrained")["forgetting", "forget_score", "forget"].n == 3


def test_rows_are_methods_with_their_settings():
    other = results_dict("salun", 0, plots=False)
    other["method"]["settings"] = {**other["method"]["settings"], "density": 0.3}
    rows = Comparison.of([results("salun", 0), results("salun", 1), results("ssd", 0), Results.from_dict(other)]).rows()
    assert [(row.label, len(row.runs)) for row in rows] == [
        ("salun (density=0.5)", 2),
        ("ssd", 1),
        ("salun (density=0.3)", 1),
    ]
    assert rows[0].verdicts == {"removed (as far as tested)": 2}


def test_another_case_or_the_same_run_twice_is_refused():
    other = results_dict("ssd", 0, plots=False)
    other["case"]["data"]["fingerprint"] = "ff"
    with pytest.raises(BadData, match="another data for method 'ssd'"):
        Comparison.of([results("salun"), Results.from_dict(other)])
    with pytest.raises(BadData, match="'salun' twice"):
        Comparison.of([results("salun"), results("salun")])
    with pytest.raises(BadData):
        Comparison.of([])


def test_saved_and_loaded_from_files(tmp_path):
    paths = [results(method).save(tmp_path / f"{method}.json") for method in ("salun", "ssd")]
    comparison = Comparison.of(paths, command="again")
    back = Comparison.load(comparison.save(tmp_path / "comparison.json"))
    assert back.digest() == comparison.digest() and [row.label for row in back.rows()] == ["salun", "ssd"]
