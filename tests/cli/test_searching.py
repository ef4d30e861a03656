"""`expunge search` from a case file."""

from __future__ import annotations

import json

import pytest

from expunge.cli.searching import space_of
from expunge.errors import BadSetting


def test_ranges_and_values_are_read():
    assert space_of(["lr=1e-4..0.1:log", "epochs=1..5", "policy=other,uniform", "clip=1.0"]) == {
        "lr": (1e-4, 0.1, "log"), "epochs": (1, 5), "policy": ["other", "uniform"], "clip": [1.0],
    }  # fmt: skip
    for bad in ("lr", "lr=", "=1..2"):
        with pytest.raises(BadSetting, match="setting=low..high"):
            space_of([bad])


def test_search_prints_the_front_and_keeps_every_trial(shell, case_file, tmp_path):
    pytest.importorskip("optuna")
    out = tmp_path / "found"
    result = shell(
        "search", case_file, "--over", "lr=0.005..0.05:log", "--over", "density=0.2,0.8", "--trials", 3, "--out", out
    )
    assert result.exit_code == 0, result.output
    stored = json.loads((out / "search.json").read_text())
    assert len(stored["trials"]) == 3 and stored["chosen"] in stored["front"]
    assert {t["settings"]["epochs"] for t in stored["trials"]} == {2}  # the case's own settings stay
    assert "forget gap" in result.text and "method.lr=" in result.text
    assert "Did you mean 'density'" in shell("search", case_file, "--over", "densty=0.2,0.8").text
    assert "at least one setting" in shell("search", case_file).text


def test_the_dry_run_counts_an_attack_and_its_repeated_updates():
    """16 inner passes and 4 updates of a forget row; a retain row sees the 4 updates alone."""
    from expunge import Plan, Term
    from expunge.cli.estimate import _passes
    from expunge.parts import ascend, fit, latent, sam

    plan = Plan(Term(ascend()), Term(fit(), "retain"), adversary=latent("1"))
    assert (_passes(plan, "forget"), _passes(plan, "retain")) == (20, 4)
    assert (_passes(plan.with_(adversary=sam()), "forget"), _passes(plan.with_(adversary=sam()), "retain")) == (2, 1)
