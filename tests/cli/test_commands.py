"""The commands, from a user's files to records on disk; errors are one panel and exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from expunge.cli.build import build_case
from expunge.cli.config import read_case
from expunge.cli.estimate import estimate, retraining
from expunge.files import digest_weights
from expunge.methods import find, methods
from expunge.methods.outcome import protect, unlearn
from expunge.parts import Optimizer, Plan, Term, ascend, fit, pgd, sam

LIGHT = """
import sys
from typer.testing import CliRunner
from expunge.cli.main import app
result = CliRunner().invoke(app, {arguments!r})
heavy = [name for name in ("torch", "numpy", "sqlalchemy", "sklearn") if name in sys.modules]
print(result.exit_code, heavy)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "none.json"], ["run", "--help"]])
def test_help_and_verify_need_no_torch(arguments):
    start = time.perf_counter()
    code = LIGHT.format(arguments=arguments)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith(f"{2 if arguments[0] == 'verify' else 0} []"), found.stdout + found.stderr
    assert time.perf_counter() - start < 10  # generous: the machine may be busy; importing torch alone is what counts


def test_module_is_the_command():
    found = subprocess.run([sys.executable, "-m", "expunge", "--version"], capture_output=True, text=True, check=True)
    from expunge import __version__

    assert found.stdout.strip() == __version__


@pytest.mark.parametrize(
    ("what", "some"),
    [("methods", "salun"), ("tasks", "regression"), ("audits", "ua"), ("attacks", "membership"),
     ("scopes", "salient"), ("objectives", "npo")],
)  # fmt: skip
def test_ls(shell, what, some):
    result = shell("ls", what)
    assert result.exit_code == 0 and some in result.text
    assert f"| {some} |" in shell("ls", what, "--markdown").output


def test_ls_one_method_and_wrong_names(shell):
    text = shell("ls", "methods", "salun").text
    assert "density" in text and "share of weights that may move" in text and "2310.12508" in text
    wrong = {"methods": ["metods"], "salun": ["methods", "salon"], "salient": ["scopes", "salint"]}
    for guess, arguments in wrong.items():
        result = shell("ls", *arguments)
        assert result.exit_code == 2 and f"Did you mean '{guess}'?" in result.text, result.text


def test_ls_lists_every_method(shell):
    text = shell("ls", "methods", "--markdown").output
    assert all(f"| {name} |" in text for name in methods())


def test_validate(shell, case_file):
    result = shell("validate", case_file)
    assert result.exit_code == 0, result.output
    assert "valid" in result.text and "rows where labels == 3" in result.text


@pytest.mark.parametrize(
    ("override", "title", "words"),
    [
        ("method.densty=0.3", "BadSetting", "Did you mean 'density'?"),
        ("method.density=3", "BadSetting", "less than or equal to 1"),
        ("method=salum", "BadSetting", "Did you mean 'salun'?"),
        ("recipe.epoch=3", "BadSetting", "Did you mean 'epochs'?"),
        ("request={samples: [5, 5]}", "BadRequest", "more than once"),
        ("request={samples: [900]}", "BadRequest", "0..199"),
        ("request={label: 12}", "BadRequest", "found none"),
        ("data.columns.labels=digits", "BadData", "Did you mean 'digit'?"),
        ("model.factory=small_net:bild", "BadModel", "Did you mean 'build'?"),
        ("model.settings.hidden=8", "BadModel", "expected"),
        ("model.weights=small_net.py", "BadModel", "safetensors"),
        ("task=clasification", "BadSetting", "Did you mean 'classification'?"),
        ("audit.checks=[uaa]", "BadSetting", "found 'uaa'"),
        ("test=null", "", "valid"),
        ("recipe=null", "", "valid"),
    ],
)
def test_validate_finds(shell, case_file, override, title, words):
    result = shell("validate", case_file, override)
    assert result.exit_code == (2 if title else 0), result.output
    assert title in result.text and words in result.text
    assert "Traceback" not in result.output


def test_debug_shows_where(shell, case_file):
    result = shell("validate", case_file, "method=salum", "--debug")
    assert result.exit_code == 1 and type(result.exception).__name__ == "BadSetting"


def test_dry_run(shell, case_file):
    result = shell("run", case_file, "--dry-run", "method.density=0.3")
    assert result.exit_code == 0, result.output
    assert "min relabel(other)[forget] ; loss[retain] over salient(0.3)" in result.text
    case = build_case(read_case(case_file))
    forget, retain = len(case.split("forget")), len(case.split("retain"))
    assert f"rows passed: {2 * forget} forget + {2 * retain} retain" in result.text
    share = 100 * 2 * (forget + retain) / (5 * retain)
    assert f"{share:.3g} %" in result.text
    assert not (case_file.parent / "runs").exists()


def test_dry_run_lists_unmet_needs(shell, case_file):
    result = shell("run", case_file, "--dry-run", "method=retrain", "recipe=null")
    assert result.exit_code == 2 and "unmet" in result.text and "retrain needs the training recipe" in result.text


@pytest.mark.parametrize(
    "plan",
    [
        Plan(Term(ascend(), "forget"), Term(fit(), "retain"), epochs=2, batch_size=16),
        Plan(Term(ascend(), "forget"), Term(fit(), "retain", batch_size=50), epochs=2, batch_size=16, rhythm="in_turn"),
        Plan(Term(ascend(), "forget"), Term(fit(), "retain"), epochs=1, batch_size=32, rhythm="mixed"),
        Plan(Term(ascend(), "forget"), Term(fit(), "retain"), epoch_of="forget", batch_size=7, pool={"retain": 0.3}),
        Plan(phases=(Plan(Term(fit(), "retain"), epochs=1), Plan(Term(ascend(), "forget"), epochs=3, batch_size=5))),
    ],
    ids=["together", "in_turn", "mixed", "pool", "phases"],
)
def test_estimate_counts_what_the_loop_does(case_file, plan):
    case = build_case(read_case(case_file))
    outcome = unlearn(case, plan.with_(optimizer=Optimizer("sgd", lr=1e-6)), floor=None)
    assert estimate(plan, case).updates == outcome.record["updates"]


def test_estimate_by_hand(case_file):
    case = build_case(read_case(case_file))
    forget, retain = len(case.split("forget")), len(case.split("retain"))
    players = (sam(), pgd(steps=3, on="retain"))
    plan = Plan(Term(ascend(), "forget"), Term(fit(), "retain"), rhythm="in_turn", adversary=players)
    found = estimate(plan, case)
    assert found.rows == {"forget": forget, "retain": retain} and found.work == 2 * forget + 4 * retain
    whole = retraining(case.recipe, retain)
    assert whole.updates == 5 * -(-retain // 64) and found.fraction == pytest.approx(found.work / (5 * retain))


def test_run_leaves_a_run_folder_and_resumes_it(shell, case_file):
    result = shell(
        "run", case_file, "--no-audit", "method.density=0.4", "curves={every: 1, of: [forget.loss], rows: 50}"
    )
    assert result.exit_code == 0, result.output
    run = case_file.parent / "runs" / "threes"
    for name in ("case.yaml", "config.yaml", "env.json", "request.json", "metrics.jsonl", "outcome.json"):
        assert (run / name).exists(), name
    assert yaml.safe_load((run / "config.yaml").read_text())["settings"]["density"] == 0.4
    assert '"forget.loss"' in (run / "metrics.jsonl").read_text()  # and the tensors are those of a run without curves
    case = build_case(read_case(case_file))
    expected = unlearn(case, find("salun").configure(density=0.4, epochs=2, batch_size=64)).model.state_dict()
    found = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    stamp = (run / "model" / "model.safetensors").stat().st_mtime_ns
    assert shell("run", case_file, "--no-audit", "method.density=0.4").exit_code == 0
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_what_a_method_keeps_goes_on_to_the_next_request(shell, case_file):
    ssd = ("method={name: ssd, alpha: 5}", "floor=null", "--no-audit")
    assert shell("run", case_file, *ssd).exit_code == 0
    first = case_file.parent / "runs" / "threes"
    next_one = (
        "request={label: 5}", "method={name: ssd, alpha: 5, stored: always}", "floor=null", "out=runs/fives", "--no-audit",
        f"model.weights={first / 'model' / 'model.safetensors'}",
    )  # fmt: skip
    alone = shell("run", case_file, *next_one)
    assert alone.exit_code != 0 and "stored importance" in alone.text
    result = shell("run", case_file, *next_one, "state=runs/threes")
    assert result.exit_code == 0, result.output
    record = json.loads((case_file.parent / "runs" / "fives" / "outcome.json").read_text())["record"]
    assert record["notes"]["stored_importance_used"]


def test_what_is_prepared_serves_a_request(shell, case_file, tmp_path):
    result = shell("prepare", case_file, "method=ssd", "request=null", "--out", tmp_path / "kept")
    assert result.exit_code == 0 and "kept for later requests" in result.text, result.output
    ssd = ("method={name: ssd, alpha: 5}", "floor=null", "--no-audit")
    served = shell("run", case_file, *ssd, f"state={tmp_path / 'kept'}")
    assert served.exit_code == 0, served.output
    record = json.loads((case_file.parent / "runs" / "threes" / "outcome.json").read_text())["record"]
    assert record["notes"]["stored_importance_used"]
    assert "one of" in shell("prepare", case_file).text  # salun has nothing to measure


def test_samples_from_a_text_file(shell, case_file):
    (case_file.parent / "ids.txt").write_text("3\n5\n8\n")
    assert "forget 3" in shell("validate", case_file, "request={samples: ids.txt}").text
    (case_file.parent / "ids.txt").write_text("3\nfive\n")
    assert "one per line" in shell("validate", case_file, "request={samples: ids.txt}").text


def test_audit_report_verify(shell, case_file):
    """The whole story on disk; then results, certificate and weights are tampered with, one after another."""
    result = shell("run", case_file, "audit.attacks=false", "audit.checks=[ua, ra, ta]")
    assert result.exit_code == 0, result.output
    assert "verdict" in result.text
    run = case_file.parent / "runs" / "threes"
    result = shell("verify", run)
    assert result.exit_code == 0 and "This does not prove" in result.text, result.output
    key = run.parent / "signing-key.pem.pub"
    assert shell("verify", run / "certificate.json", "--key", key).exit_code == 0
    assert shell("verify", run / "certificate.json", "--key", "0" * 64).exit_code == 2

    (run / "report.html").unlink()
    assert shell("report", run).exit_code == 0 and (run / "report.html").exists()

    result = shell("audit", run, "--checks", "ua", "--no-attacks", "--seed", "3")
    assert result.exit_code == 0, result.output
    results = json.loads((run / "results.json").read_text())
    assert [m["check"] for m in results["measurements"]] == ["ua"] and results["seeds"]["audit"] == 3
    assert shell("verify", run).exit_code == 0

    results["measurements"][0]["unlearned"] = 0.0
    (run / "results.json").write_text(json.dumps(results))
    result = shell("verify", run)
    assert result.exit_code == 2 and "VerificationFailed" in result.text and "measurements" in result.text

    certificate = json.loads((run / "certificate.json").read_text())
    certificate["sections"]["method"]["name"] = "retrain"
    (run / "certificate.json").write_text(json.dumps(certificate))
    result = shell("verify", run / "certificate.json")
    assert result.exit_code == 2 and "changed after signing: method" in result.text

    other = case_file.parent / "net.safetensors"
    assert shell("verify", run / "certificate.json", "--weights", other).exit_code == 2


def test_audit_refuses_what_is_not_that_run(shell, case_file, tmp_path):
    result = shell("audit", tmp_path)
    assert result.exit_code == 2 and "no case.yaml and no outcome.json" in result.text
    assert shell("run", case_file, "--no-audit").exit_code == 0
    run = case_file.parent / "runs" / "threes"
    stored = (run / "case.yaml").read_text()
    (run / "case.yaml").write_text(stored.replace("train.npz", "test.npz", 1))
    result = shell("audit", run)
    assert result.exit_code == 2, result.output


def test_compare(shell, case_file, tmp_path):
    out = tmp_path / "comparison"
    result = shell(
        "compare", case_file, "audit.attacks=false", "audit.checks=[ua, ra, ta]", "--methods",
        "fine_tune:epochs=1,salun:epochs=1:density=0.2", "--seeds", 2, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "fine_tune" in result.text and "salun" in result.text and (out / "report.html").exists()
    stored = json.loads((out / "comparison.json").read_text())
    assert len(stored["results"]) == 4
    assert {r["method"]["settings"].get("density") for r in stored["results"]} == {None, 0.2}
    (out / "report.html").unlink()
    assert shell("report", out).exit_code == 0 and (out / "report.html").exists()


def test_compare_says_what_is_wrong_before_any_work(shell, case_file):
    assert "name:key=value" in shell("compare", case_file, "--methods", "salun:density").text
    assert "Did you mean 'salun'?" in shell("compare", case_file, "--methods", "salum").text
    assert "--seeds 3" in shell("compare", case_file, "--methods", "salun", "--seeds", "0").text


def test_protect_names_the_methods_that_can(shell, case_file):
    result = shell("protect", case_file)
    assert result.exit_code == 2 and "acts at training time" in result.text


def test_requests_are_served_from_the_folder_that_protect_left(shell, case_file, tmp_path):
    """Two requests in a row, each from the folder of the one before, end where one process ends."""
    method, kept = "method={name: sisa, shards: 2, slices: 2}", tmp_path / "kept"
    result = shell("protect", case_file, method, "request=null", "recipe.epochs=2", "--out", kept)
    assert result.exit_code == 0 and "accuracy" in result.text and "expunge run" in result.text, result.output
    assert {f.name for f in (kept / "protected").iterdir()} == {"model.safetensors", "protected.json"}
    model = protect(
        build_case(read_case(case_file, [method, "request=null", "recipe.epochs=2"])), "sisa", shards=2, slices=2
    )
    folder = kept
    for name, rows in (("a", [3, 50]), ("b", [7])):
        request = f"request={{samples: {rows}}}"
        result = shell("run", folder, request, "--no-audit", "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        case = build_case(read_case(case_file, [method, request, "recipe.epochs=2"]))
        model = unlearn(case.with_(model=model), "sisa", shards=2, slices=2).model
        assert digest_weights(tmp_path / name / "model") == digest_weights(model.state_dict())
        folder = tmp_path / name
    checked = shell("audit", tmp_path / "b", "--checks", "ua", "--no-attacks")
    assert checked.exit_code == 0, checked.output
    again = shell("run", tmp_path / "b", "request={samples: [3]}", "--no-audit", "--out", tmp_path / "c")
    assert again.exit_code == 2 and "already forgotten" in again.text


def test_a_folder_to_serve_from_is_a_protected_one_and_the_run_goes_elsewhere(shell, case_file, tmp_path):
    assert "protected.json" in shell("run", case_file.parent, "--out", tmp_path / "x").text
    kept = tmp_path / "kept"
    shell("protect", case_file, "method={name: acu, width: 20}", "request=null", "--out", kept)
    assert "a run folder of its own" in shell("run", kept, "request={label: 3}").text
    assert "a run folder of its own" in shell("run", kept, "request={label: 3}", "--out", kept).text
    assert "all met" in shell("run", kept, "request={label: 3}", "--dry-run").text
    assert shell("validate", kept, "request={label: 3}").exit_code == 0


def test_the_rows_of_a_request_are_in_no_record(shell, case_file):
    """The user's own case.yaml names them; what the run writes beside it holds their count and digest only."""
    assert shell("run", case_file, "--no-audit", "request={samples: [17, 101, 173]}").exit_code == 0
    run = case_file.parent / "runs" / "threes"
    records = [f for f in run.rglob("*") if f.suffix in (".json", ".jsonl", ".yaml") and f.name != "case.yaml"]
    assert len(records) >= 4
    for file in records:
        assert not re.search(r"17,\s*101,\s*173|-\s*17\s+-\s*101", file.read_text()), file.name
