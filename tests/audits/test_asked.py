"""Checks, attacks and budgets as a user names them: what is asked is what runs, and what is wrong is told before anything runs."""

import numpy as np
import pytest
import yaml
from tests.toys import toy

from expunge.audits.asked import asked
from expunge.audits.attacks.budget import Budget, attacked
from expunge.audits.attacks.pruning import Pruning
from expunge.audits.attacks.relearning import Relearning
from expunge.audits.base import checks
from expunge.cli.config import check_case, read_case, save_case
from expunge.engine import fit
from expunge.errors import BadSetting
from expunge.methods.outcome import unlearn
from expunge.records.audit import Auditor


def test_a_list_and_a_mapping_ask_for_the_same():
    listed = asked(["ua", {"name": "lm_eval", "tasks": ["arc_easy"], "limit": 5}])
    mapped = asked({"ua": None, "lm_eval": {"tasks": ["arc_easy"], "limit": 5}})
    assert listed.checks == mapped.checks == ["ua", "lm_eval"]
    assert listed.settings == mapped.settings == {"lm_eval": {"tasks": ["arc_easy"], "limit": 5}}


def test_default_stands_for_what_runs_anyway_once_each():
    assert asked().wanted(["a", "b"]) == ["a", "b"]
    assert asked(["lm_eval"]).wanted(["a"]) == ["lm_eval"]
    assert asked(["lm_eval", "default"]).wanted(["a", "b"]) == ["lm_eval", "a", "b"]
    assert asked(["ua", "default"]).wanted(["ra", "ua"]) == ["ua", "ra"]


def test_attacks_take_fields_and_budgets_of_their_own():
    found = asked(
        attacks=["pruning_20", {"name": "relearning", "share": 0.5, "budget": {"steps": 9}}],
        budget={"steps": 2, "examples": 4},
    )
    assert found.attacks == [Pruning(0.2), Relearning(share=0.5)]
    assert found.budget.of("pruning_20").steps == 2
    assert found.budget.of("relearning") == Budget(steps=9, examples=4)  # the rest is the audit's
    assert "own" not in found.budget.describe()
    own = asked({"relearning_curve": {"budget": {"examples": 0.5}}}, budget=Budget(steps=3))
    assert own.settings["relearning_curve"]["budget"] == Budget(steps=3, examples=0.5)


def test_everything_wrong_is_one_error_with_the_nearest_names():
    with pytest.raises(BadSetting) as error:
        asked(
            ["uaa", {"name": "lm_eval", "task": ["mmlu"]}, {"tasks": []}],
            ["prunin_20", {"name": "relearning", "shares": 1, "budget": {"step": 2}}],
            {"example": 3},
            "classification",
        )
    text = str(error.value)
    for words in ("Did you mean 'ua'?", "Did you mean 'tasks'?", "Did you mean 'pruning_20'?", "Did you mean 'share'?",
                  "Did you mean 'steps'?", "Did you mean 'examples'?", "found {'tasks': []}"):  # fmt: skip
        assert words in text, (words, text)


def test_wrong_settings_are_told_before_a_gold_is_trained():
    with pytest.raises(BadSetting, match="Did you mean 'batch_size'"):
        Auditor(toy("class").case, gold="retrain", checks=[{"name": "lm_eval", "batchsize": 2}])


def test_what_is_asked_is_what_the_audit_runs():
    """One attack, harder than the others: verdict and check read the same scores, those of a direct run."""
    found = toy("class")
    auditor = Auditor(
        found.case, gold=found.retrained, floor=fit(found.case, "retain", 2), checks=["relearning", "pruning_20"],
        attacks=["pruning_20", {"name": "relearning", "share": 0.5, "budget": {"steps": 8}}], budget={"steps": 1},
    )  # fmt: skip
    outcome = unlearn(found.case, "fine_tune", epochs=1)
    audit = auditor.audit(outcome)
    direct = attacked(auditor.subjects(outcome.model), Relearning(share=0.5), Budget(steps=8))
    told = {m.check: m for m in audit.results.attacks}
    assert told["relearning"].unlearned == pytest.approx(float(np.mean(direct.unlearned)), abs=1e-12)
    weak = attacked(auditor.subjects(outcome.model), Relearning(share=0.5), Budget(steps=1))
    assert abs(np.mean(weak.unlearned) - np.mean(direct.unlearned)) > 1e-4  # the budget is felt


def test_the_profile_hears_a_checks_settings():
    found = toy("class")
    auditor = Auditor(found.case, gold=found.retrained, attacks=False,
                      checks={"relearning_curve": {"budget": {"steps": 2}}})  # fmt: skip
    assert auditor.asked.settings["relearning_curve"]["budget"].steps == 2
    assert "budget" in checks()["relearning_curve"].settings


FILE = """
model: {factory: "m:f", weights: w.safetensors}
data: train.npz
request: {label: 3}
method: salun
audit:
  checks: [default, {name: lm_eval, tasks: [arc_easy]}]
  attacks: [pruning_20, {name: relearning, budget: {steps: 20}}]
  budget: {examples: 0.2}
  profile: open_problems
"""


def test_a_case_file_says_the_same_and_survives_being_kept(tmp_path):
    (tmp_path / "case.yaml").write_text(FILE)
    case = read_case(tmp_path / "case.yaml")
    for file in (case, read_case(save_case(case, tmp_path / "run"))):
        found = asked(**file.audit.asked(), kind="language")
        assert found.settings == {"lm_eval": {"tasks": ["arc_easy"]}} and found.checks == ["default", "lm_eval"]
        assert found.budget.of("relearning") == Budget(steps=20, examples=0.2)
        assert file.audit.chosen()["profile"] == "open_problems"
    content = yaml.safe_load(FILE) | {"audit": {"checks": {"rouge": {"new_tokens": 8}}, "attacks": False}}
    found = asked(**check_case(content).audit.asked(), kind="language")
    assert found.settings == {"rouge": {"new_tokens": 8}} and found.attacks == []
