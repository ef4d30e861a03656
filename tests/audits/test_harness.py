"""The bridge to the lm-evaluation-harness against a slow loop over the choices' log-likelihoods."""

import json
import random
from functools import cache

import numpy as np
import pytest
import torch
from tests.toys import facts, language_table, tiny_llama, words_tokenizer

from expunge.audits import Subjects
from expunge.audits.base import checks
from expunge.audits.metrics.harness import main_metrics
from expunge.cases import requests
from expunge.cases.case import Case
from expunge.cases.text import TextData
from expunge.errors import BadData, BadModel, BadSetting, MissingExtra, UnmetNeed
from expunge.records.audit import EXPENSIVE

QUESTIONS, CHOICES = 24, 4
installed = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("lm_eval") is None, reason="lm_eval is not installed"
)


def documents():
    """Facts of eight people: the answer and three people's other answers, the right one at a place of its own."""
    questions, answers, _ = facts(range(8))
    rows = []
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        wrong = [answers[(i + 3 * k) % len(answers)] for k in range(1, CHOICES)]
        wrong.insert(i % CHOICES, answer)
        rows.append({"question": question, "choices": wrong, "label": i % CHOICES})
    return rows


@pytest.fixture
def folder(tmp_path):
    """Two tasks of the harness on the same questions: no demonstrations, and the first question as one."""
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents()))
    for name, shots in (("toy_facts", 0), ("toy_shown", 1)):
        (tmp_path / f"{name}.yaml").write_text(
            f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/facts.jsonl}}, cache_dir: {tmp_path}/cache}}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: {shots}
fewshot_config: {{sampler: first_n}}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: brier_score, aggregation: brier_score, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3.0}}
"""
        )
    return tmp_path


def llama(seed):
    torch.manual_seed(seed)
    return tiny_llama(len(words_tokenizer())).double().eval()


@cache
def subjects():
    """Four models with weights of their own; accuracies differ by chance alone, which is all that the bridge needs."""
    case = Case(llama(0), language_table(range(8)), requests.where("person", ">=", 6), task="language")
    return Subjects(case, llama(0), llama(1), llama(2), llama(3))


@torch.no_grad()
def slow_accuracy(model, shots=0):
    """(n,) whether the right choice has the largest sum of log-probabilities, one choice at a time.

    shots: 1: after the first question that is another one, with its answer."""
    tokenizer, hits, rows = words_tokenizer(), [], documents()
    for i, row in enumerate(rows):
        other = rows[1 if i == 0 else 0]
        shown = f"{other['question']} {other['choices'][other['label']]}\n\n" if shots else ""
        scores = []
        for choice in row["choices"]:
            prompt, answer = (tokenizer(text)["input_ids"] for text in (shown + row["question"], " " + choice))
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(answer)))
        hits.append(int(np.argmax(scores)) == row["label"])
    return np.array(hits, dtype=float)


@installed
def test_the_bridge_equals_a_loop_over_the_choices_log_likelihoods(folder):
    subjects()  # made before the random state is looked at
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    plain, shown = checks()["lm_eval"](subjects(), tasks=["toy_facts", "toy_shown"], include_path=str(folder))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())

    for row, shots in ((plain, 0), (shown, 1)):
        assert row.unit == "acc" and row.direction == "higher" and row.range == (0.0, 1.0)
        own = {name: slow_accuracy(subjects().model(name), shots) for name in subjects().compared}
        for name in ("original", "unlearned", "retrained"):
            assert getattr(row, name) == pytest.approx(own[name].mean(), abs=1e-12)
            error = own[name].std(ddof=1) / QUESTIONS**0.5
            expected = np.clip(own[name].mean() + np.array([-1.96, 1.96]) * error, 0, 1)
            assert row.intervals[name] == pytest.approx(expected, abs=1e-9)
        assert row.floor == pytest.approx(abs(own["floor"].mean() - own["retrained"].mean()), abs=1e-12)
        assert len({float(own[name].mean()) for name in own}) > 1  # else the equality would say little
    assert plain.name == "lm_eval_toy_facts" and plain.note == "24 of 24 questions; 0 shots; version 3.0"
    assert "1 shots" in shown.note


@installed
def test_a_limit_takes_the_first_questions_and_the_model_stays_as_it_was(folder):
    model = subjects().model("original").train()
    (row,) = checks()["lm_eval"](subjects(), tasks="toy_facts", limit=10, include_path=str(folder))
    assert row.original == pytest.approx(slow_accuracy(model.eval())[:10].mean())
    assert row.note.startswith("10 of 24 questions")
    assert words_tokenizer().pad_token == "<pad>"


@installed
def test_one_clear_error_each_before_any_model_runs(folder, monkeypatch):
    check = checks()["lm_eval"]
    real = __import__("lm_eval.tasks").tasks.TaskManager  # without the harness's own thousands of files
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: real(**(given | {"include_defaults": False})))
    with pytest.raises(BadSetting, match="found 'toy_fact'. Did you mean 'toy_facts'"):
        check(subjects(), tasks=("toy_fact",), include_path=str(folder))
    (folder / "facts.jsonl").unlink()
    with pytest.raises(BadData, match="expected the data of the harness task 'toy_facts' at hand"):
        check(subjects(), tasks=("toy_facts",), include_path=str(folder))
    with pytest.raises(BadSetting, match="found none; name some"):
        check(subjects(), tasks=())
    table = language_table(range(8))
    bare = TextData(table.tokens, table.starts, person=table.column("person"))
    case = Case(llama(0), bare, requests.where("person", ">=", 6), task="language")
    with pytest.raises(UnmetNeed, match="to have its tokenizer"):
        check(Subjects(case, llama(0), llama(1)), tasks=("toy_facts",))


@installed
def test_a_model_without_a_config_is_refused(folder):
    case = subjects().case
    plain = torch.nn.Sequential(
        torch.nn.Embedding(len(words_tokenizer()), 4), torch.nn.Linear(4, len(words_tokenizer()))
    )
    with pytest.raises(BadModel, match="expected a model of transformers"):
        checks()["lm_eval"](Subjects(case, plain, plain), tasks=("toy_facts",), include_path=str(folder))


def test_a_missing_library_gives_the_install_line(monkeypatch):
    real = __import__("importlib").import_module

    def without(name, *rest):
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(MissingExtra, match=r"pip install 'expunge\[harness\]'"):
        checks()["lm_eval"](subjects())


def test_the_main_metric_is_the_first_of_which_more_is_better_and_groups_stand_for_their_members():
    found = main_metrics({
        "results": {
            "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "member": {"alias": "member", "acc,none": 0.4, "acc_stderr,none": 0.1},
            "words": {"alias": "words", "perplexity,none": 9.0, "perplexity_stderr,none": "N/A", "acc,none": 0.3},
            "sums": {"exact_match,strict": 0.1, "exact_match,loose": 0.2},
            "text": {"bits_per_byte,none": 2.0},
            "tag": {"alias": "tag"}, "tagged": {"score,none": 1.0},
        },
        "group_subtasks": {"group": ["member"], "tag": ["tagged"]},
        "higher_is_better": {
            "group": {"acc": True}, "words": {"perplexity": False, "acc": True}, "sums": {"exact_match": True},
            "text": {"bits_per_byte": False},
        },
    })  # fmt: skip
    assert found == {
        "group": ("acc,none", "higher"), "words": ("acc,none", "higher"), "sums": ("exact_match,strict", "higher"),
        "text": ("bits_per_byte,none", "lower"), "tagged": ("score,none", "match"),
    }  # fmt: skip


def test_it_is_run_only_when_asked_for_by_name():
    assert "lm_eval" in EXPENSIVE and checks()["lm_eval"].kinds == ("language",)
