"""What a table of language runs says of the runs that are kept."""

from __future__ import annotations

import pytest

from expunge.benchmarks import language_tables
from expunge.benchmarks.language_tables import attacked
from expunge.errors import BadData
from expunge.methods import find
from expunge.records.results import Results
from record_fixtures import measurement, results_dict


def test_attacks_stand_beside_the_claim_of_today(tmp_path):
    for seed, back in enumerate((0.2, 0.4)):
        data = results_dict("scrub", seed)
        data["method"]["intention"] = "suppression"  # as the registry had it when the run was made
        data["attacks"] = [
            measurement("relearning", "forget_score", "forget", 0.9, back, 0.001, 0.0),
            measurement("privleak", "privleak", "forget", 0.5, 0.5, 0.5, 0.0),
        ]
        Results.from_dict(data).save(tmp_path / "scrub" / f"seed{seed}.json")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in attacked(tmp_path, ["scrub"]).splitlines()]
    assert lines[0] == ["model", "relearning", "claims", "verdict"]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert rows["original"][0].startswith("0.900") and rows["retrained"][0].startswith("0.001")
    assert rows["scrub"][0].startswith("0.300 ±") and rows["scrub"][1] == find("scrub").intention == "removal"
    with pytest.raises(BadData, match="language_tables fixed"):
        attacked(tmp_path / "nothing")


def test_requests_one_after_another_are_rows_of_means_over_seeds(monkeypatch, tmp_path):
    def scores(seed, method, way, step):
        base = {"grad_diff": 10.0, "npo": 20.0}[method] + (5.0 if way == "sustainability" else 0.0) + step
        return {
            key: {"unlearned": [base + seed, 0, 0], "retrained": [1.0 + seed, 0, 0]} for key in language_tables.HEADINGS
        }

    def scaling(case, method, settings, seed, folds):
        assert case == f"case {seed}" and settings["lr"]
        ways = ("scalability", "sustainability")
        return {w: [{"step": k, "scores": scores(seed, method, w, k)} for k in (1, 2)] for w in ways}

    monkeypatch.setattr(language_tables, "nano_muse", lambda seed: f"case {seed}")
    monkeypatch.setattr(language_tables, "scaling", scaling)
    lines = language_tables.scaled((0, 2), ("grad_diff", "npo, gentle"), folds=2, folder=tmp_path).splitlines()
    monkeypatch.setattr(language_tables, "scaling", lambda *_: pytest.fail("what was done is read, not done again"))
    assert language_tables.scaled((0, 2), ("grad_diff", "npo, gentle"), folds=2, folder=tmp_path).splitlines() == lines
    rows = {line.split("|")[1].strip(): line.split("|")[2].split("±")[0].strip() for line in lines[2:]}
    assert list(rows)[:2] == ["retrained without 1 of 2", "retrained without 2 of 2"] and len(rows) == 2 + 2 * 2 * 2
    assert rows["retrained without 2 of 2"] == "2"  # the mean of 1 and 3, each counted once
    assert rows["grad_diff, scalability 2"] == "13" and rows["npo, gentle, sustainability 1"] == "27"


def test_costs_are_times_over_retrainings_of_the_same_seed(monkeypatch, tmp_path):
    class Testbed:
        case = "a case"

    spent, clock = {"fit": 10.0, "npo": 1.0, "grad_ascent": 2.0}, [0.0]

    def spend(name):
        clock[0] += spent[name]

    monkeypatch.setattr(language_tables, "nano_tofu", lambda seed: Testbed)
    monkeypatch.setattr(language_tables, "fit", lambda case, split, seed: spend("fit"))
    monkeypatch.setattr(language_tables, "unlearn", lambda case, name, **_: spend(name))
    monkeypatch.setattr(language_tables.time, "process_time", lambda: clock[0])
    lines = language_tables.costs((0, 1), ("npo", "grad_ascent"), tmp_path).splitlines()
    rows = {
        line.split("|")[1].strip(): [cell.split("±")[0].strip() for cell in line.split("|")[2:4]] for line in lines[2:]
    }
    assert rows == {"retrained": ["10", "1"], "npo": ["1", "0.1"], "grad_ascent": ["2", "0.2"]}
