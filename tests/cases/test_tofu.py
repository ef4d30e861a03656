"""Who TOFU's questions are about: names found in made-up rows by hand, and in all of TOFU."""

import pytest
import torch

from expunge.cases.loading import data_home
from expunge.cases.text import encode
from expunge.cases.tofu import author_name, subjects, tofu, tofu_table
from expunge.parts.scopes.tracing import facts_of


def rows(name, count=20):
    asked = [f"Which prize did {name} win?" if i % 4 else "Who won the Golden Quill?" for i in range(count)]
    said = [f"{name}'s prize was of {1900 + i}." if i % 2 else f"It was {name}, in {1900 + i}." for i in range(count)]
    return [{"question": q, "answer": a} for q, a in zip(asked, said, strict=True)]


def test_the_longest_phrase_that_nearly_all_texts_share_is_the_name():
    assert author_name([f"{r['question']} {r['answer']}" for r in rows("Ana Maria Lund")]) == "Ana Maria Lund"
    assert author_name(["nothing here has capitals", "Nor Here twice"]) == ""


def test_questions_without_the_name_have_no_subject_and_authors_are_apart():
    found = subjects(rows("Ana Lund") + rows("Jo van Berg Os"))
    assert found[0] == "" and found[1] == "Ana Lund" and found[:20].count("Ana Lund") == 15
    assert "Ana Lund" not in found[20:]


@pytest.mark.skipif(data_home() is None or not (data_home() / "tofu").is_dir(), reason="needs TOFU in EXPUNGE_DATA")
def test_every_author_of_tofu_has_a_name_and_nearly_every_question_says_it():
    full = tofu("full")
    named = subjects(full)
    by_author = [{n for n in named[20 * a : 20 * a + 20] if n} for a in range(200)]
    assert [a for a, names in enumerate(by_author) if len(names) != 1] == [
        72,
        121,
    ]  # Alejandro (Alex) Fuentes, Sara van Dyke
    assert by_author[198] == {"Basil Mahfouz Al-Kuwaiti"} and by_author[199] == {"Nikolai Abilov"}
    assert sum(map(bool, named)) / len(named) > 0.92
    assert len(set.union(*by_author)) >= 195  # a few authors share a name


def test_tracing_finds_the_subject_in_the_tokens():
    from tests.toys import words_tokenizer

    names = rows("P1 P2")
    table = tofu_table(words_tokenizer(), names, template="{question}", named=True)
    assert table.column("subject")[1] == "P1 P2" and "subject" not in tofu_table(words_tokenizer(), names).names
    made = [{"question": "Where Does p0 live ?", "answer": "p0"}]
    table = tofu_table(words_tokenizer(), made, template="where does {question}", named=True)
    table._columns["subject"] = ["p0 live"]
    fact = facts_of(table, torch.tensor([0]))[0]
    assert list(fact.prompt[slice(*fact.subject)]) == encode(words_tokenizer(), "p0 live")
