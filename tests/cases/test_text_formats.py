"""Chat templates, and the side of the padding, of language data."""

from __future__ import annotations

import copy

import pytest
import torch

from expunge.cases.text import TextData, question_answer
from expunge.errors import BadData
from expunge.tasks import Batch, Language
from expunge.tasks.language import NO_ANSWER
from toys import tiny_llama, words_tokenizer

TASK = Language()
CHAT = "{% for m in messages %}user {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
ROWS, STARTS = [[3, 4, 5, 6, 1], [7, 8, 1], [9, 10, 11, 12, 13, 14, 1]], [2, 1, 3]


def chat_tokenizer():
    tokenizer = copy.deepcopy(words_tokenizer())  # the toy is shared
    tokenizer.add_tokens(["user", "who", "sleeps", "assistant", "the", "king"])
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.mark.parametrize("template", [None, "chat"])
def test_a_chat_prompt_is_masked_opens_the_answer_and_keeps_it(template):
    tokenizer = chat_tokenizer()
    data = question_answer(tokenizer, ["who sleeps"], ["the king"], template=template)
    assert data.decode(data.prompt_ids()[0]).split() == ["user", "who", "sleeps", "assistant"]
    word = tokenizer.convert_tokens_to_ids
    answer = [word("the"), word("king"), tokenizer.eos_token_id]
    labels = data.fetch(torch.tensor([0]))["labels"][0]
    assert labels.tolist() == [NO_ANSWER] * 4 + answer


def test_a_template_given_goes_before_the_tokenizers_own():
    data = question_answer(chat_tokenizer(), ["who sleeps"], ["the king"], template="the {question}")
    assert data.decode(data.prompt_ids()[0]).split() == ["the", "who", "sleeps"]


def test_chat_without_a_chat_template_says_what_to_set():
    with pytest.raises(BadData, match="expected a tokenizer with a chat template, found one without; .*chat_template"):
        question_answer(words_tokenizer(), ["who"], ["the king"], template="chat")


def left(batch: Batch) -> Batch:
    """The same rows with their padding moved to the left."""
    columns = dict(batch.columns)
    for name in ("input_ids", "attention_mask", "labels"):
        lengths = batch["attention_mask"].sum(1).tolist()
        width = batch[name].shape[1]
        columns[name] = torch.stack([row.roll(width - n) for row, n in zip(batch[name], lengths, strict=True)])
    return Batch(batch.ids, columns)


@torch.no_grad()
def test_log_likelihoods_do_not_depend_on_the_side_of_the_padding():
    model = tiny_llama(16).double().eval()
    right = TextData(ROWS, STARTS, pad=0).fetch(torch.arange(3))
    moved = left(right)
    assert moved["attention_mask"][1].tolist() == [0, 0, 0, 0, 1, 1, 1]
    values = [TASK.log_likelihood(TASK.forward(model, batch), batch) for batch in (right, moved)]
    torch.testing.assert_close(values[1], values[0], atol=1e-8, rtol=0)
    for i, (row, start) in enumerate(zip(ROWS, STARTS, strict=True)):  # each row alone, without padding
        log_p = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        alone = sum(log_p[t - 1, row[t]] for t in range(start, len(row)))
        torch.testing.assert_close(values[0][i], alone, atol=1e-8, rtol=0)


@torch.no_grad()
def test_generations_of_padded_prompts_are_those_of_each_prompt_alone():
    model = tiny_llama(16).double().eval()
    prompts = [row[:-1] for row in ROWS]
    for prompt, written in zip(prompts, TASK.generate(model, prompts, 6), strict=True):
        text = list(prompt)
        for _ in range(6):
            text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        assert written == text[len(prompt) :]
