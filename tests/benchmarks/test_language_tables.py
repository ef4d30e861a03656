"""What a table of language runs says of the runs that are kept."""

from __future__ import annotations

import pytest

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
