"""results.json: what is written comes back, what does not fit is named, and equal records have equal digests."""

from __future__ import annotations

import json
import math
import os

import pytest

from expunge.errors import BadData, DiskFull
from expunge.records.canonical import canonical, digest, digest_ids, plain
from expunge.records.results import Results
from record_fixtures import results, results_dict


def test_what_is_saved_comes_back_with_the_same_digest(tmp_path):
    data = results_dict()
    data["measurements"][0]["unlearned"] = math.nan
    data["measurements"][1]["range"] = (0, math.inf)
    run = Results.from_dict(data)
    back = Results.load(run.save(tmp_path / "results.json"))
    assert math.isnan(back.measurements[0].unlearned) and back.measurements[1].range == (0, math.inf)
    assert back.seeds.audit == 2**62 and back.digest() == run.digest()
    assert back.measurements[2:] == run.measurements[2:] and back.plots == run.plots and back.cost == run.cost
    json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_any_change_changes_the_digest():
    data = results_dict()
    data["measurements"][3]["floor"] += 1e-16
    assert Results.from_dict(data).digest() != results().digest()


def test_cost_relative_to_retraining_is_filled_in():
    assert results("salun").cost.relative == pytest.approx(0.11)
    without = {**results_dict(), "cost": {"seconds": 2.0}}
    assert Results.from_dict(without).cost.relative is None


def test_every_wrong_field_is_named(tmp_path):
    data = results_dict()
    data["measurements"][0]["direction"] = "up"
    data["colour"] = "red"
    data["measurements"][1]["intervals"] = {"original": (2, 1)}
    data["plots"]["roc"]["ulira"]["original"]["fpr"].pop()
    with pytest.raises(BadData, match="Expected results") as caught:
        Results.from_dict(data)
    for part in ("measurements.0.direction", "colour", "measurements.1", "runs backwards", "plots.roc.ulira.original"):
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\x80", "null"])
def test_a_broken_file_is_told(tmp_path, text):
    (tmp_path / "results.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadData, match=r"Expected results.*found.*make the file again"):
        Results.load(tmp_path / "results.json")


def test_records_do_not_change():
    with pytest.raises(Exception, match="frozen"):
        results().cost.seconds = 1.0


def test_full_disk_keeps_the_old_results(tmp_path, monkeypatch):
    path = results("salun").save(tmp_path / "results.json")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFull):
        results("ssd").save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["results.json"]


# Number spellings of RFC 8785, appendix B (IEEE 754 bits there, values here).
NUMBERS = {
    0.0: "0",
    5e-324: "5e-324",
    -5e-324: "-5e-324",
    1.7976931348623157e308: "1.7976931348623157e+308",
    9007199254740992.0: "9007199254740992",
    295147905179352830000.0: "295147905179352830000",
    9.999999999999997e22: "9.999999999999997e+22",
    1e23: "1e+23",
    1e21: "1e+21",
    999999999999999900000.0: "999999999999999900000",
    9.999999999999997e-7: "9.999999999999997e-7",
    0.000001: "0.000001",
    333333333.33333325: "333333333.33333325",
    0.001: "0.001",
    1.0: "1",
    -0.25: "-0.25",
    1e-7: "1e-7",
    1.5e300: "1.5e+300",
    100.0: "100",
    123456.789: "123456.789",
}


@pytest.mark.parametrize(("value", "text"), NUMBERS.items())
def test_numbers_are_spelled_as_in_rfc_8785(value, text):
    assert canonical(value) == text.encode() and canonical(-0.0) == b"0"
    assert float(text) == value


def test_the_example_of_rfc_8785():
    """Section 3.2.3 (sorting by UTF-16 units) and 3.2.4 (escapes)."""
    names = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew",
        "1": "One",
        "\U0001f600": "Emoji",
        "\x80": "C",
        "\u00f6": "o",
    }
    order = list(json.loads(canonical(names)))
    assert order == ["\r", "1", "\x80", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    assert canonical('\u20ac$\u000f\nA\'B"\\\\"/') == b'"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'


def test_what_has_no_portable_spelling_is_refused_or_made_plain():
    for value in (math.nan, math.inf, 2**53, {1: 2}, object(), "\ud800"):
        with pytest.raises(BadData, match="Expected"):
            canonical(value)
    assert plain((math.nan, -math.inf, 2**60, {1: {2}})) == ["NaN", "-Infinity", str(2**60), {"1": [2]}]
    assert plain(2**53 - 1) == 2**53 - 1


def test_digests_of_ids_are_of_sets():
    assert digest_ids([3, 1, 2, 2]) == digest_ids((1, 2, 3)) == digest(["1", "2", "3"]) != digest_ids([1, 2])
