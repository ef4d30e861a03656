"""Other answers written by the model: what it is asked, what of its text counts, and that AltPO learns just these."""

from functools import cache

import pytest
import torch
from tests.toys import tiny_llama, words_tokenizer
from torch import nn

from expunge import Case, requests, unlearn
from expunge.cases.data import Split
from expunge.cases.text import TextData, encode, question_answer
from expunge.errors import BadData, UnmetNeed
from expunge.parts import alternates
from expunge.parts.alternates import LEAD, REQUEST, Writing, questions, written
from expunge.tasks.language import Language

ASKED, SAID = ["where does p0 live ?", "what does p1 do ?"], ["p0 lives in oslo .", "p1 works as a baker ."]


def table(**more) -> TextData:
    return question_answer(words_tokenizer(), ASKED, SAID, template="{question}", **more)


def split(data=None) -> Split:
    data = data or table()
    return Split("forget", data, torch.arange(len(data)))


class Scripted(nn.Module):
    """Says the next of its lines, whatever it is asked."""

    def __init__(self, *lines: str):
        super().__init__()
        self.weight, self.lines, self.asked, self.settings = nn.Parameter(torch.ones(2)), list(lines), [], []

    def generate(self, input_ids, attention_mask, **settings):
        self.settings.append(settings)
        for row, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            self.asked.append([t for t, m in zip(row, mask, strict=True) if m])
        tokenizer = words_tokenizer()
        new = [encode(tokenizer, self.lines.pop(0)) + [1] for _ in input_ids]
        longest = max(map(len, new))
        return torch.cat([input_ids, torch.tensor([row + [0] * (longest - len(row)) for row in new])], dim=1)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(alternates, "_KEPT", {})


def test_the_model_is_shown_question_answer_and_request():
    assert questions(table(), [1]) == [f"what does p1 do ? p1 works as a baker .\n{REQUEST}\n{LEAD}"]


def test_a_chat_model_is_asked_in_its_own_format_by_the_bare_question():
    import copy

    tokenizer = copy.deepcopy(words_tokenizer())
    turn, start = (
        "{% for m in messages %}does live {{ m['content'] }} do {% endfor %}",
        "{% if add_generation_prompt %}what {% endif %}",
    )
    tokenizer.chat_template = turn + start
    data = question_answer(tokenizer, ASKED, SAID)
    shown = questions(data, [0, 1])[0]
    assert shown == f"does live Question: where does p0 live ?\nAnswer: p0 lives in oslo .\n{REQUEST} do what {LEAD}"


def test_empty_and_true_answers_are_drawn_again_and_an_answer_ends_at_a_question(monkeypatch):
    monkeypatch.setattr(alternates, "STOPS", ("what",))
    model = Scripted("p0 lives in rome . what does p0", "p0  lives in oslo .", "", "p1 works as a pilot .",
                     "p0 lives in lima .", "p1 works as a judge .")  # fmt: skip
    found = written(Language(), model, split(), how=Writing(count=2))
    texts = {row: [table().decode(a) for a in own] for row, own in found.items()}
    assert texts == {
        0: ["p0 lives in rome .", "p0 lives in lima ."],
        1: ["p1 works as a pilot .", "p1 works as a judge ."],
    }
    assert all(own[-1] == 1 for row in found.values() for own in row)  # the end is learned
    assert len(model.asked) == 6  # four, and the two that were thrown away
    first = model.settings[0]
    assert first["do_sample"] and first["temperature"] == 1.0 and first["top_k"] == 0 and first["top_p"] == 1.0
    assert model.asked[0] == encode(words_tokenizer(), questions(table(), [0])[0])


def test_a_model_that_only_recites_is_told_apart():
    with pytest.raises(BadData, match="only recites") as error:
        written(Language(), Scripted(SAID[0], "p1 works as a judge .", SAID[0], SAID[0]), split(), how=Writing(count=1))
    assert "1 rows ([0])" in str(error.value) and "oslo" not in str(error.value)


def test_answers_are_written_once_for_a_model_and_rows(tmp_path, monkeypatch):
    model, how = Scripted("p0 lives in rome .", "p1 works as a judge ."), Writing(count=1, folder=str(tmp_path))
    first = written(Language(), model, split(), how=how)
    assert written(Language(), model, split(), how=how) is first  # in memory
    alternates._KEPT.clear()
    assert written(Language(), model, split(), how=how) == first and not model.lines  # from the folder
    alternates._KEPT.clear()
    with torch.no_grad():
        model.weight.add_(1.0)
    model.lines = ["p0 lives in lima .", "p1 works as a smith ."]
    assert written(Language(), model, split(), how=how) != first  # another model writes its own


def test_what_cannot_be_asked_says_so():
    bare = TextData(table().tokens, table().starts)
    with pytest.raises(UnmetNeed, match="tokenizer"):
        written(Language(), Scripted(), split(bare))
    model = tiny_llama(len(words_tokenizer()))
    model.config.max_position_embeddings = 40
    with pytest.raises(BadData, match="context of 40"):
        written(Language(), model, split())


@cache
def case(**more) -> Case:
    data = question_answer(words_tokenizer(), [*ASKED, "which pet has p2 ?"], [*SAID, "p2 keeps a cat named bo ."],
                           template="{question}")  # fmt: skip
    torch.manual_seed(0)
    return Case(tiny_llama(len(words_tokenizer())), data, requests.samples([0, 1]), task="language")


def test_altpo_with_written_answers_is_altpo_with_the_same_answers_given():
    own = case()
    found = written(own.task, own.model, own.split("forget"), seed=3, how=Writing(count=2, new_tokens=6))
    assert found == written(own.task, own.model, own.split("forget"), seed=3, how=Writing(count=2, new_tokens=6))
    alternates._KEPT.clear()
    assert found == written(own.task, own.model, own.split("forget"), seed=3, how=Writing(count=2, new_tokens=6))
    data = own.data
    given = own.with_(data=TextData(data.tokens, data.starts, data.tokenizer, pad=data.pad,
                                    alternates=[found.get(i, [[1]]) for i in range(3)]))  # fmt: skip
    settings = {"seed": 3, "floor": None, "lr": 1e-2, "epochs": 2, "batch_size": 2}
    a = unlearn(own, "altpo", count=2, new_tokens=6, **settings)
    b = unlearn(given, "altpo", answers="given", **settings)
    assert "written" in a.formula and "alternates" in b.formula
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a.model.parameters(), own.model.parameters(), strict=True))
    with pytest.raises(UnmetNeed, match="answers='written'"):
        unlearn(own, "altpo", answers="given")
