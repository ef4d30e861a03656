"""The bench of papers' claims: its chains, crossings and tables by hand; its mixture is one, and what is run is what is told."""

import json

import numpy as np
import pytest

from expunge.benchmarks import language_claims as claims
from expunge.errors import BadSetting
from expunge.parts.mixture import mixtures


def test_chains_stay_in_their_states_as_often_as_stated():
    for kind, length in claims.LENGTHS.items():
        rows = np.array(claims.chains(kind, 4000, 0))
        assert rows.shape == (4000, length)
        inside = np.isin(rows, claims.CHAINS[kind])
        assert abs(inside.mean() - 0.8) < 0.01
        assert (
            abs(np.mean(rows == claims.CHAINS[kind][0]) - 0.8 / 3) < 0.01 and abs(np.mean(rows == 9) - 0.2 / 7) < 0.005
        )
    assert claims.chains("retain", 3, 1) == claims.chains("retain", 3, 1) != claims.chains("retain", 3, 2)


def test_a_level_is_crossed_between_two_measurements():
    path = [{"forget1": 1.0, "retain": 0.0}, {"forget1": 0.6, "retain": 0.1}, {"forget1": 0.2, "retain": 0.5}]
    assert claims.crossing(path, "forget1", 0.4) == pytest.approx(0.3)
    assert claims.crossing(path, "forget1", 0.8) == pytest.approx(0.05)
    assert claims.crossing(path, "forget1", 0.1) == float("inf") and claims.number(float("inf")) == "never"


def test_the_mixture_has_eight_experts_in_every_block_and_two_a_token():
    found = mixtures(claims.mixture(claims.Size(width=32, layers=2, heads=2)))
    assert [(m.count, m.top_k) for m in found] == [(8, 2), (8, 2)]


def test_tables_tell_means_and_spread_of_the_kept_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "claims.md")
    claims.kept.cache_clear()
    for seed, value in ((0, 0.25), (1, 0.75)):
        rows = {"original": {"forget": 0.9}, "targeted": {"forget": value, "updates": 40}}
        (tmp_path / "runs" / "nano").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "nano" / f"latent-{seed}.json").write_text(json.dumps(rows))
    claims.main(["table"])
    page = (tmp_path / "claims.md").read_text()
    assert "| targeted | 0.5 (0.25 to 0.75) |" in page and "Seeds 0, 1." in page and "## experts" not in page
    claims.kept.cache_clear()
    with pytest.raises(BadSetting, match="latend"):
        claims.main(["latend"])
