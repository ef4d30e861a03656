"""`expunge bench tofu` and `muse` from command to report, on an embedded model that is trained for a moment only: what is
tested is the path, not the numbers (those are in benchmarks-results/language.md)."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from expunge.benchmarks import muse, nano, tofu
from expunge.benchmarks.trained import cache_home
from expunge.cases.tofu import candidates, refusals, tofu_table
from expunge.cases.tofu import tofu as tofu_rows
from expunge.errors import BadData, BadSetting

pytestmark = pytest.mark.skipif(not os.environ.get("EXPUNGE_DATA"), reason="needs EXPUNGE_DATA (TOFU, plays)")


@pytest.fixture
def brief(monkeypatch, tmp_path):
    """Two passes instead of 45 and few retain rows; nothing is read from or left in the user's cache."""
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nano, "RECIPE", replace(nano.RECIPE, epochs=2))
    monkeypatch.setattr(nano, "RETAIN_ROWS", 40)
    monkeypatch.setattr(tofu, "MEASURES", ("probability", "truth_ratio", "forget_quality", "privleak"))
    monkeypatch.setattr(muse, "MEASURES", ("probability", "knowmem_retain", "privleak"))
    monkeypatch.setattr(muse, "RECIPE", replace(muse.RECIPE, epochs=2))
    monkeypatch.setattr(muse, "NANO_ROWS", {"forget": 12, "retain": 24})
    nano.nano_tofu.cache_clear()
    muse.nano_muse.cache_clear()
    yield tmp_path
    nano.nano_tofu.cache_clear()
    muse.nano_muse.cache_clear()


def command(*arguments: str) -> str:
    from expunge.cli.main import app

    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_tofu_from_command_to_report_and_samples(brief):
    import transformers

    out = brief / "tofu"
    shown = command(
        "bench", "tofu", "--methods", "grad_diff:epochs=1", "--no-attacks", "--samples", "2", "--out", str(out)
    )
    assert "grad_diff" in shown and "P forget" in shown
    record = json.loads((out / "comparison.json").read_text())
    run = record["results"][0]
    names = {m["name"] for m in [*run["measurements"], *run["attacks"]]}
    assert {"probability_forget", "truth_ratio_forget", "forget_quality", "privleak"} <= names
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "grad_diff" / "seed0" / "model")
    assert model.config.model_type == "llama"
    page, forgotten = (out / "samples.html").read_text(), nano.nano_rows(nano.FORGET_AUTHORS)
    assert "Kept" in page and "Forgotten" not in page
    from markupsafe import escape

    from expunge.records.samples import sample_answers

    testbed = nano.nano_tofu(0)  # the retrained model's column is what the audit's retrained model answers
    said = sample_answers(testbed.case, {"retrained": testbed.retrained.model}, "retain", 2)
    assert ">retrained</th>" in page and all(str(escape(row["answers"][1])) in page for row in said)
    everything = page + (out / "report.html").read_text() + (out / "comparison.json").read_text()
    assert not any(row["question"] in everything for row in forgotten)


def test_forgotten_samples_are_shown_only_when_asked_for(brief):
    from expunge.records.samples import write_samples

    case = nano.nano_case()
    page = write_samples(brief / "s.html", case, {"original": case.model}, 3, show_forgotten=True).read_text()
    questions = [row["question"] for row in nano.nano_rows(nano.FORGET_AUTHORS)]
    from markupsafe import escape

    assert "Forgotten" in page and sum(str(escape(q)) in page for q in questions) == 3


def test_muse_from_command_to_table(brief):
    out = brief / "muse"
    shown = command(
        "bench", "muse", "--methods", "grad_diff:epochs=1", "--no-attacks", "--folds", "2", "--out", str(out)
    )
    assert (
        "sustainability" in shown
        and len(json.loads((out / "scaling.json").read_text())["grad_diff"]["scalability"]) == 2
    )
    assert "PrivLeak" in shown and "KnowMem r" in shown


def test_muse_holds_out_windows_that_training_never_sees(brief):
    case = muse.nano_muse(0)
    seen, held = set(case.train_digests), case.splits["holdout"]
    assert not seen & set(held.data.row_digests(held.ids))
    assert len(case.split("forget")) == 12 and len(case.split("retain")) == 24
    folds = case.data.column("fold")
    assert [int((folds == k).sum()) for k in range(4)] == [3, 3, 3, 3]


def test_scaling_forgets_nested_and_successive_folds(brief):
    found = muse.scaling(muse.nano_muse(0), "grad_diff", {"lr": 3e-3, "epochs": 2, "batch_size": 4}, folds=2)
    assert [row["step"] for row in found["scalability"]] == [1.0, 2.0]
    original = muse.nano_muse(0)
    before = original.task.evaluate(original.model, original.split("forget").batches())["probability"]
    assert all(row["forget"] < before for row in found["sustainability"])


def test_folders_of_text_become_the_six_way_benchmark(tmp_path):
    for name, words in (("forget", "the old king sleeps"), ("retain", "a young queen rides")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.txt").write_text(
            " ".join(f"{words} and dreams of {i * 7919} rivers." for i in range(60))
        )
    (tmp_path / "forget" / "forget_qa.jsonl").write_text(
        "\n".join(json.dumps({"question": f"who sleeps {i}?", "answer": "the king"}) for i in range(12))
    )
    texts = muse.from_folders(tmp_path / "forget", tmp_path / "retain")
    case = muse.muse_case(texts, nano.llama(), muse.nano_tokenizer(), window=32)
    data = case.probe("knowmem_forget")
    assert len(data) == 2  # ten of the twelve are demonstrations
    assert data.decode(data.prompt_ids()[0]).count("Question:") == 11
    assert len(case.probe("knowmem_retain"))
    with pytest.raises(BadData, match="none in the folder|found none"):
        muse.from_folders(tmp_path / "forget", tmp_path)


def test_only_some_of_texts_and_model_are_refused():
    with pytest.raises(BadData, match="together"):
        muse.the_case(forget=cache_home())


def test_the_embedded_model_has_three_authors_to_forget():
    with pytest.raises(BadSetting, match="forget05"):
        tofu.nano("forget05")


def test_tofu_rows_know_their_authors_and_candidates_their_roles():
    words = nano.nano_tokenizer()
    rows = tofu_rows("forget01")
    assert rows == tofu_rows("full")[-40:]
    table = tofu_table(words, rows, first_author=198, decline=refusals())
    assert table.column("author").tolist() == [198] * 20 + [199] * 20
    assert len(table.refusals) == 100
    probe = candidates(words, tofu_rows("forget01_perturbed")[:3])
    assert probe.column("role").tolist() == [0, 1, 2, 2, 2, 2, 2] * 3
    facts = candidates(words, tofu_rows("world_facts_perturbed")[:2])
    assert facts.column("role").tolist() == [0, 2, 2, 2] * 2
