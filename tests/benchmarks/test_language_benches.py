"""`expunge bench tofu` and `muse` from command to report, on an embedded model that is trained for a moment only: what is
tested is the path, not the numbers (those are in benchmarks-results/language.md)."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
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


def test_muse_from_command_to_table_and_scaling(brief):
    out = brief / "muse"
    shown = command(
        "bench", "muse", "--methods", "grad_diff:epochs=1", "--no-attacks", "--folds", "2", "--out", str(out)
    )
    assert "sustainability" in shown and "PrivLeak" in shown and "KnowMem r" in shown
    # nested folds from the original, and folds in turn
    found = json.loads((out / "scaling.json").read_text())["grad_diff"]
    for steps in found.values():
        assert [step["step"] for step in steps] == [1, 2]
        for step in steps:
            assert set(step["scores"]) == set(muse.HEADINGS)
            for subjects in step["scores"].values():
                assert set(subjects) == {"original", "unlearned", "retrained"}
                assert all(low <= value <= high for value, low, high in subjects.values())
            assert step["scores"]["privleak"]["retrained"][0] == 0
    first, second = (step["scores"] for step in found["sustainability"])
    alone = found["scalability"][0]["scores"]
    assert (
        first == alone and second != found["scalability"][1]["scores"]
    )  # the second request starts from the first's model
    case = muse.nano_muse(0)
    # a cloze is asked once its window is to be gone
    asked = [len(muse._gone_by(case, k).probe("knowmem_forget")) for k in range(4)]
    assert asked == sorted(asked) and asked[0] < asked[3] == len(case.probe("knowmem_forget"))
    assert len(muse._gone_by(case, 0).split("forget")) == 3


def test_muse_holds_out_windows_that_training_never_sees(brief):
    case = muse.nano_muse(0)
    seen, held = set(case.train_digests), case.splits["holdout"]
    assert not seen & set(held.data.row_digests(held.ids))
    assert len(case.split("forget")) == 12 and len(case.split("retain")) == 24
    folds = case.data.column("fold")
    assert [int((folds == k).sum()) for k in range(4)] == [3, 3, 3, 3]


def hub_folder(root, ending=".json"):
    """MUSE's layout in small: a corpus of stories."""
    story = lambda who, n: f"{who} {n} walks by river {n * 7919} and sleeps under tree {n}. " * 4  # noqa: E731
    pairs = lambda who, n: [{"question": f"who walks by {who} {i}?", "answer": f"{who} {i}"} for i in range(n)]  # noqa: E731
    files = {
        "raw/forget": [story("king", i) for i in range(6)], "raw/retain1": [story("queen", i) for i in range(8)],
        "raw/holdout": [story("duke", i) for i in range(6)],
        "verbmem/forget": [{"prompt": f"king {i} walks by", "gt": f" river {i * 7919} and sleeps"} for i in range(5)],
        "knowmem/forget_qa": pairs("king", 4), "knowmem/forget_qa_icl": pairs("knave", 10),
        "knowmem/retain_qa": pairs("queen", 3), "knowmem/retain_qa_icl": pairs("page", 10),
        "privleak/forget": [story("king", i) for i in range(4)], "privleak/holdout": [story("duke", i) for i in range(5)],
        **{f"sust/forget_{k + 1}": [story(f"lord {k}", i) for i in range(k + 1)] for k in range(4)},
    }  # fmt: skip
    for name, rows in files.items():
        file = root / f"{name}{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if ending == ".parquet":
            import pyarrow
            from pyarrow import parquet

            file = file.with_name(f"{file.stem}-00000-of-00001.parquet")
            parquet.write_table(
                pyarrow.Table.from_pylist([r if isinstance(r, dict) else {"text": r} for r in rows]), file
            )
        else:
            file.write_text(json.dumps(rows))
    return files


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_the_hubs_layout_becomes_the_six_way_benchmark(ending, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path))
    files = hub_folder(tmp_path / "muse" / "news", ending)
    texts = muse.muse_texts("news")
    assert texts == muse.muse_texts(tmp_path / "muse" / "news") and list(texts.forget) == files["raw/forget"]
    tokenizer = story_tokenizer([row for name in files if name[:3] in ("raw", "sus") for row in files[name]])
    case = muse.muse_case(texts, nano.llama(), tokenizer, window=24)
    words = lambda table: " ".join(table.decode(row) for row in table.tokens)  # noqa: E731
    assert "duke" in words(case.splits["holdout"].data) and "duke" not in words(case.data)
    assert "king" not in words(case.splits["holdout"].data)
    said, prompts = case.probe("verbmem"), case.probe("verbmem").prompt_ids()
    assert said.decode(prompts[2]).strip() == "king 2 walks by" and "15838" in said.decode(said.answer_ids()[2])
    asked = case.probe("knowmem_forget")
    assert len(asked) == 4 and asked.decode(asked.prompt_ids()[0]).count("Question:") == 11
    assert len(case.probe("privleak_forget")) == 4 and len(case.probe("privleak_holdout")) == 5
    folded = muse.muse_case(texts, nano.llama(), tokenizer, window=10_000, folded=True)
    fold = folded.data.column("fold")
    assert [int((fold == k).sum()) for k in range(4)] == [1, 2, 3, 4]
    assert all("lord 2" in folded.data.decode(folded.data.tokens[i]) for i in (fold == 2).nonzero().flatten().tolist())


def story_tokenizer(texts):
    tokenizers, transformers = (__import__(name) for name in ("tokenizers", "transformers"))
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<eos>": 1, "<pad>": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>", "<pad>"], show_progress=False)
    more = [
        f"Question: who walks by {w} {i}? Answer: knave page"
        for w in ("king", "queen", "knave", "page")
        for i in range(12)
    ]
    inner.train_from_iterator([*texts, *more], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def test_privleak_asks_the_benchmarks_own_texts(brief):
    """The area of the given texts by the slow count of pairs, not of the rows to forget."""
    from expunge.audits.base import run_checks
    from expunge.audits.subjects import Subjects

    case = muse.nano_muse(0)
    some = case.data.subset([0, 3, 5, 30, 31])
    given = case.with_(
        probes={**case.probes, "privleak_forget": some, "privleak_holdout": case.holdout.subset([0, 1, 2, 4])}
    )
    other = nano.llama()
    subjects = Subjects(given, case.model, case.model, other)
    (found,) = run_checks(subjects, ["privleak"])

    def scores(model, table):
        batch = case.task.prepare(table.fetch(torch.arange(len(table))), torch.Generator())
        with torch.no_grad():
            return case.task.signals(case.task.forward(model, batch), batch)["min_k_40"].tolist()

    def area(model):
        told, others = scores(model, some), scores(model, given.probe("privleak_holdout"))
        hits = [(a > b) + 0.5 * (a == b) for a in told for b in others]
        return sum(hits) / len(hits)

    held, gold = 1 - area(case.model), 1 - area(other)
    assert found.unlearned == pytest.approx(100 * (held - gold) / gold, abs=1e-3)


def test_a_part_of_the_layout_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path))
    hub_folder(tmp_path / "own")
    (tmp_path / "own" / "verbmem" / "forget.json").write_text(json.dumps([{"prompt": "a"}]))
    with pytest.raises(BadData, match="prompt and gt in MUSE's verbmem/forget, found prompt"):
        muse.muse_texts(tmp_path / "own")
    (tmp_path / "own" / "verbmem" / "forget.json").write_text("[{")
    with pytest.raises(BadData, match=r"forget\.json to hold JSON"):
        muse.muse_texts(tmp_path / "own")
    (tmp_path / "own" / "verbmem" / "forget.json").unlink()
    with pytest.raises(BadData, match=r"expected forget\.json.* of MUSE's verbmem in .*own/verbmem, found none"):
        muse.muse_texts(tmp_path / "own")
    with pytest.raises(BadData, match=r"one of news, books, or a folder .*found 'newz'\. Did you mean 'news'"):
        muse.muse_texts("newz")
    with pytest.raises(BadData, match="--data news|books|DIR with --model"):
        muse.the_case(data="news")


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
