"""The report shows every measurement and no content, stands alone, and says what it leaves out."""

from __future__ import annotations

import math
import re

import pytest

from expunge.records.comparison import Comparison
from expunge.records.plots import Bubble, area_under, loss_histograms, trade_off, training_curves
from expunge.records.report import render, write_report
from expunge.records.results import Curve, Results
from expunge.records.svg import Chart, brief, grouped, show, ticks
from expunge.records.views import grade
from record_fixtures import METHODS, SECRET, results, results_dict


@pytest.fixture(scope="module")
def comparison():
    return Comparison.of(results(method, seed) for method in METHODS for seed in range(3))


def test_every_measurement_is_in_the_table():
    run = results()
    page = render(run)
    for row in (*run.measurements, *run.attacks):
        for value in (row.original, row.unlearned, row.retrained):
            assert f'title="{value!r}">{show(value)}' in page, (row.key, value)
        assert show(row.gap, signed=True) in page and row.check in page and row.name in page
        assert row.floor is None or show(row.floor) in page
    for low, high in run.measurements[0].intervals.values():
        assert f"{show(low)} to {show(high)}" in page


def test_every_measurement_of_every_method_is_in_the_comparison(comparison):
    page = render(comparison)
    for row in comparison.rows():
        assert set(row.values) == set(comparison.keys())
        for key in row.values:
            summary = row.values[key]["unlearned"]
            assert repr(summary.mean) in page and show(summary.mean) in page
    for subject in ("original", "retrained", "floor"):
        for summary in comparison.shared(subject).values():
            assert repr(summary.mean) in page


def test_it_says_what_a_reader_needs():
    run, page = results("ssd"), render(results("ssd"))
    assert "hidden, not gone" in page and "suppressed" in page and run.verdict.reason in page
    for text in (
        "minimise  relabel(forget)",
        "What this does not prove",
        "Other attacks may",
        run.command,
        "32 rows by id",
    ):
        assert text in page
    for text in (*run.versions.values(), str(run.seeds.audit), run.weights.after, run.case.data.fingerprint):
        assert text in page
    assert "utility fell to 0.88" in render(results("salun"))


@pytest.mark.parametrize("method", METHODS)
def test_every_verdict_has_plain_words(method):
    page = render(results(method, plots=False))
    assert f"Verdict: {results(method).verdict.verdict}" in page and '<div class="verdict' in page


def test_no_content_no_ids_no_script_nothing_fetched(comparison):
    data = results_dict()
    data["case"]["request"]["ids"] = [918273645, 192837465]
    data["method"]["name"] = "<script>alert(1)</script>"
    data["warnings"] = ["<img src=x onerror=alert(1)>"]
    data["plots"]["roc"]['"><b>x'] = data["plots"]["roc"].pop("ulira")
    data["plots"]["loss_histograms"]["</svg><i>"] = data["plots"]["loss_histograms"].pop("retain")
    data["case"]["notes"] = {"text": SECRET}
    for page in (render(Results.from_dict(data)), render(comparison)):
        assert not re.search(r"<(script|img|link|iframe|object|b>x|i>)\b", page)
        assert "918273645" not in page and SECRET not in page
        assert not re.search(r"<[^>]*\s(src|href)=|url\(|@import", page)
        assert set(re.findall(r"https?://[^\"' <]+", page)) <= {"http://www.w3.org/2000/svg"}
        assert "default-src 'none'" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in render(Results.from_dict(data))


def test_what_is_missing_is_said_and_not_drawn():
    data = results_dict(plots=False)
    data |= {"history": [], "attacks": [], "verdict": None}
    page = render(Results.from_dict(data))
    assert page.count('<svg viewBox="0 0 760') == 1  # the trade-off needs no arrays
    for reason in (
        "no per-example losses were recorded on forget",
        "no ROC curve",
        "no per-class",
        "fewer than two points",
        "no attack was run",
        "No verdict was made",
    ):
        assert reason in page
    bare = {"schema": "expunge.results/1", "case": {"task": "t", "data": {"fingerprint": "f", "rows": 1}}}
    bare |= {"method": {"name": "m"}, "cost": {"seconds": 0}}
    page = render(Results.from_dict(bare))
    assert "no measurement was recorded" in page and "it needs a forget measurement" in page and "<polyline" not in page
    assert render(Comparison.of([Results.from_dict(bare)]))


def test_numbers_that_are_none_or_not_finite_do_not_break_it():
    data = results_dict()
    data["measurements"][0] |= {"unlearned": math.nan, "floor": None, "intervals": {}}
    data["measurements"][1] |= {"original": None, "retrained": None, "intervals": {}}
    data["measurements"][3] |= {"unlearned": math.inf}
    data["plots"]["curves"] = [{"step": 0, "forget": 1.0}, {"step": 1, "forget": math.inf}, {"step": 2, "forget": 2.0}]
    data["plots"]["loss_histograms"]["forget"]["unlearned"] = [math.inf, None, 1.0]
    data["plots"]["per_class"]["unlearned"][3] = None
    page = render(Results.from_dict(data))
    assert "not a number" in page and "nan" not in re.findall(r'points="[^"]*"', page).__str__()


def test_it_is_small_even_with_many_examples(tmp_path):
    data = results_dict()
    many = [i / 1000 for i in range(50_000)]
    data["plots"]["loss_histograms"]["train"] = {"original": many, "unlearned": many, "retrained": many}
    data["plots"]["roc"]["ulira"]["original"] = {"fpr": [i / 49_999 for i in range(50_000)], "tpr": [1.0] * 50_000}
    path = write_report(tmp_path / "report.html", Results.from_dict(data))
    assert path.stat().st_size < 150_000


def test_gaps_are_graded_by_the_floor():
    found = [grade(gap, 0.1, "match")[1] for gap in (0.0, -0.1, 0.15, -0.3, 0.5)]
    assert found == ["g0", "g0", "g1", "g2", "g3"]
    assert grade(0.5, 0.1, "higher")[1] == grade(-0.5, 0.1, "lower")[1] == "better"
    assert grade(-0.5, 0.1, "higher")[1] == "g3" and grade(0.0, 0.0, "match")[1] == "g0"
    assert grade(0.1, 0.0, "match") == ("floor is 0", "g3") and grade(0.1, None, "match")[1] == "none"


def test_residue_is_the_cards_formula():
    """(m(a(U)) - m(a(R))) / (m(O) - m(R)) = (0.52 - 0.2) / (0.9 - 0.1) = 0.4, shown as 40 % too."""
    data = results_dict()
    data["measurements"][0] |= {"original": 0.9, "unlearned": 0.3, "retrained": 0.1, "intervals": {}}
    data["attacks"] = [{**data["attacks"][0], "unlearned": 0.52, "retrained": 0.2}]
    page = render(Results.from_dict(data))
    assert "<b>0.400</b>" in page and "40 %" in page and ">0.250<" in page


def test_shares_of_a_histogram_by_hand():
    assert grouped([0, 0.5, 1.5, 9, -4], float, [0, 1, 2]) == [0.6, 0.4]
    empty = loss_histograms("forget", {"original": [math.nan], "unlearned": []})
    assert empty.svg is None and "Left out" in empty.caption


def test_area_under_the_curve_by_hand():
    assert area_under(Curve(fpr=(0, 0.5, 1), tpr=(0, 1, 1))) == pytest.approx(0.75)


def test_a_broken_model_does_not_stretch_the_picture():
    bubbles = [Bubble(f"m{i}", 0.01 * i, 0.9 + 0.01 * i, 0.1, "#000") for i in range(6)]
    figure = trade_off([*bubbles, Bubble("wreck", 0.02, 0.1, 0.1, "#000")], "gap", "utility")
    assert "far outside: wreck" in figure.caption and "wreck \u2193 0.100" in figure.svg


def test_only_what_no_other_beats_is_on_the_front():
    from expunge.records.plots import _front

    points = [
        Bubble(n, g, u, None, "#000")
        for n, g, u in (("a", 0.1, 0.5), ("b", 0.2, 0.4), ("c", 0.3, 0.9), ("d", 0.1, 0.4))
    ]
    assert [b.label for b in _front(points)] == ["a", "c"]


def test_coordinates_of_a_chart():
    chart = Chart((264, 156), (0, 10), (0, 100), "x", "y", "alt")
    assert (chart.px(0), chart.px(10), chart.py(0), chart.py(100)) == (64, 250, 112, 12)
    assert chart.px(5) == 157 and chart.py(50) == 62
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and ticks(3, 3) == [3]


def test_curves_fall_back_on_history():
    data = results_dict(plots=False)
    assert {name for name, _, _ in training_curves(Results.from_dict(data)).legend} == {"forget", "retain"}
    data["history"] = [{"step": i, "epoch": 0, "losses": {"relabel": 0.5 * i}, "lr": 0.1} for i in range(3)]
    assert [name for name, _, _ in training_curves(Results.from_dict(data)).legend] == ["relabel"]


def test_numbers_for_people():
    texts = [show(v) for v in (0.12345, 12.345, 123.45, 12345.6, -0.5, 1e-5, 0.0, None, math.inf)]
    assert texts == [
        "0.123",
        "12.35",
        f"{123.45:.1f}",
        "12\u202f346",
        "\u22120.500",
        "1.0e-5",
        "0.000",
        "\u2013",
        "\u221e",
    ]
    assert [brief(v) for v in (4.51, 0.0123456, 388.2, 0.0)] == ["4.51", "0.0123", "388", "0"]
    assert show(0.02, signed=True) == "+0.020"
