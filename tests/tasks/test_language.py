"""The language task against slow loops: what is labelled, what is computed, what is summed and what is averaged."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from expunge import Case, requests
from expunge.cases.text import TextData, plain_text, question_answer
from expunge.errors import BadData, BadModel, BadRequest, UnmetNeed
from expunge.parts.step import Joint, Step
from expunge.seeds import generator
from expunge.tasks import Batch, Language, language
from toys import language_table, tiny_llama, words_tokenizer

TASK = Language()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def table() -> TextData:
    """Rows of several lengths: prompts of 1-3 tokens and answers of 1-4."""
    rows = [[3, 4, 5, 6, 1], [7, 8, 1], [9, 10, 11, 12, 13, 14, 1]]
    return TextData(
        rows, [2, 2, 3], refusals=[[20, 21, 1], [22, 1]], alternates=[[[15, 1]], [[16, 1], [17, 18, 1]], [[19, 1]]]
    )


def model(seed: int = 0):
    torch.manual_seed(seed)
    return tiny_llama(30, width=16).double().eval()


def slow(net, data: TextData) -> list[list[torch.Tensor]]:
    """Row by row, without padding: the logits that predict each answer token."""
    found = []
    for row, start in zip(data.tokens, data.starts, strict=True):
        logits = net(input_ids=torch.tensor([row])).logits[0]
        found.append([logits[t - 1] for t in range(max(start, 1), len(row))])
    return found


def everything(data: TextData) -> Batch:
    return data.fetch(torch.arange(len(data)))


def test_loss_likelihood_and_choices_equal_the_row_by_row_loop():
    data, net = table(), model()
    batch = everything(data)
    output = TASK.forward(net, batch)
    assert output.prediction.shape == (3, 4, 30)
    nlls = [
        [F.cross_entropy(logits[None], torch.tensor([token])) for logits, token in zip(own, row[start:], strict=True)]
        for own, row, start in zip(slow(net, data), data.tokens, data.starts, strict=True)
    ]
    sums = torch.stack([torch.stack(own).sum() for own in nlls])
    counts = torch.tensor([len(own) for own in nlls])
    assert TASK.choices(batch).tolist() == counts.tolist() == [3, 1, 4]
    assert torch.allclose(TASK.log_likelihood(output, batch), -sums, atol=1e-10)
    assert torch.allclose(TASK.loss(output, batch), sums / counts, atol=1e-10)
    assert torch.allclose(TASK.forget_score(output, batch), (-sums / counts).exp(), atol=1e-10)


def test_plain_text_labels_every_token_but_the_first():
    net, data = model(), TextData([[3, 4, 5, 6]], [0])
    batch = everything(data)
    logits = net(input_ids=torch.tensor([[3, 4, 5, 6]])).logits[0]
    expected = F.cross_entropy(logits[:3], torch.tensor([4, 5, 6]))
    assert TASK.choices(batch).tolist() == [3]
    assert torch.allclose(TASK.loss(TASK.forward(net, batch), batch)[0], expected)


def test_padding_and_the_other_rows_change_nothing():
    data, net = table(), model()
    together = TASK.loss(TASK.forward(net, everything(data)), everything(data))
    for i in range(3):
        alone = data.fetch(torch.tensor([i]))
        assert torch.allclose(TASK.loss(TASK.forward(net, alone), alone), together[i : i + 1], atol=1e-10)


def test_signals_equal_their_definitions():
    data, net = table(), model()
    batch = everything(data)
    found = TASK.signals(TASK.forward(net, batch), batch)
    for i, (own, row, start) in enumerate(zip(slow(net, data), data.tokens, data.starts, strict=True)):
        log_p = torch.stack([F.log_softmax(logits, -1)[token] for logits, token in zip(own, row[start:], strict=True)])
        whole = torch.stack([F.log_softmax(logits, -1) for logits in own])
        mean = (whole.exp() * whole).sum(-1)
        spread = ((whole.exp() * whole**2).sum(-1) - mean**2).clamp_min(1e-6).sqrt()
        k = max(1, math.floor(0.4 * len(log_p)))
        assert torch.allclose(found["min_k_40"][i], log_p.sort().values[:k].mean())
        assert torch.allclose(found["min_k_pp_40"][i], ((log_p - mean) / spread).sort().values[:k].mean())
        assert torch.allclose(found["loss"][i], log_p.mean())
        p = log_p.mean().exp()
        assert torch.allclose(found["margin"][i], torch.log(p / (1 - p)))
        hits = [int(logits.argmax()) == token for logits, token in zip(own, row[start:], strict=True)]
        assert found["correctness"][i] == pytest.approx(sum(hits) / len(hits))


def test_divergence_is_the_mean_kl_over_answer_tokens():
    data, one, two = table(), model(0), model(1)
    batch = everything(data)
    found = TASK.divergence(TASK.forward(one, batch), TASK.forward(two, batch), batch)
    for i, (own, other) in enumerate(zip(slow(one, data), slow(two, data), strict=True)):
        kl = [
            (F.softmax(q, -1) * (F.log_softmax(q, -1) - F.log_softmax(p, -1))).sum()
            for p, q in zip(own, other, strict=True)
        ]
        assert torch.allclose(found[i], torch.stack(kl).mean())


@pytest.mark.parametrize("policy", ["refusal", "other", "random", "alternates"])
def test_relabelling_keeps_the_prompt_and_replaces_the_answer(policy):
    data = table()
    batch = everything(data).with_columns(_vocabulary=30)
    new = TASK.relabel(batch, generator(0, "relabel"), policy)
    assert TASK.prompts(new) == TASK.prompts(batch)
    allowed = {
        "refusal": [data.refusals] * 3,
        "other": [[a for j, a in enumerate(data.answer_ids()) if j != i] for i in range(3)],
        "alternates": data.alternates,
    }
    for i, answer in enumerate(TASK.answer_tokens(new)):
        if policy == "random":
            assert len(answer) == len(data.answer_ids()[i]) and answer[-1] == 1
        else:
            assert answer in allowed[policy][i]
    again = TASK.relabel(batch, generator(0, "relabel"), policy)
    assert torch.equal(new["input_ids"], again["input_ids"])


def test_a_relabelling_without_its_answers_says_how_to_get_them():
    with pytest.raises(UnmetNeed, match="refusals"):
        TASK.relabel(everything(TextData([[3, 4, 1]], [1])), generator(0), "refusal")


def test_a_joint_forward_of_unequal_batches_equals_separate_ones():
    data, net = table(), model()
    batches = {"forget": data.fetch(torch.tensor([1])), "retain": data.fetch(torch.tensor([0, 2]))}
    steps = [Step(net, TASK, batch, None, generator(0), name) for name, batch in batches.items()]
    joint = Joint(steps)
    for step in steps:
        step.joint = joint
    for step in steps:
        alone = TASK.loss(TASK.forward(net, step.batch), step.batch)
        assert torch.allclose(step.loss, alone, atol=1e-10)


def test_generation_is_greedy_and_independent_of_its_neighbours():
    net = model().float()
    prompts = [[3, 4, 5], [7], [9, 10, 11, 12]]
    found = TASK.generate(net, prompts, 5, pad=0)
    for prompt, tokens in zip(prompts, found, strict=True):
        row = list(prompt)
        for _ in range(5):
            row.append(int(net(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        assert tokens == row[len(prompt) :]
    first = found[0][1]
    cut = TASK.generate(net, prompts[:1], 5, end=first, pad=0)[0]
    assert cut == found[0][: found[0].index(first)]


# -- tables ------------------------------------------------------------------------------------------------------------
def test_greedy_answers_in_stages_are_the_same_and_ended_ones_leave_the_batch(monkeypatch):
    net, prompts = model(2), [[3, 4], [7, 8, 9], [9, 10, 11], [5]]
    whole = TASK.generate(net, prompts, 12, pad=0)
    end = whole[0][1]  # the first answer ends early
    expected = [row[: row.index(end)] if end in row else row for row in whole]
    rows, plain = [], net.generate
    monkeypatch.setattr(net, "generate", lambda **k: rows.append(len(k["input_ids"])) or plain(**k))
    monkeypatch.setattr(language, "STAGE", 3)
    assert TASK.generate(net, prompts, 12, end=end, pad=0) == expected
    longest = [sum(len(e) >= done for e in expected) for done in (0, 3, 6, 9)]
    assert rows == [n for n in longest if n] and rows[-1] < len(prompts)


def test_prompt_tokens_do_not_depend_on_the_answer_and_the_end_is_learned():
    words = words_tokenizer()
    data = question_answer(words, ["where does p1 live ?"] * 2, ["p1 lives in paris", "cat"], template="{question}")
    prompts = data.prompt_ids()
    assert prompts[0] == prompts[1] == words("where does p1 live ?")["input_ids"]
    assert all(answer[-1] == words.eos_token_id for answer in data.answer_ids())
    assert data.column("zlib_bytes").tolist()[0] > 0


def test_windows_never_reach_over_two_texts():
    words = words_tokenizer()
    data = plain_text(words, ["p1 lives in paris . " * 5, "cat dog fox"], window=8, smallest=2)
    assert data.column("document").tolist() == [0, 0, 0, 1]
    assert data.lengths == [8, 8, 8, 3]  # the 25th token of the first text is a window too small to keep
    assert data.tokens[0] + data.tokens[1] + data.tokens[2] == words("p1 lives in paris . " * 5)["input_ids"][:24]


def test_what_is_wrong_with_texts_is_said():
    words = words_tokenizer()
    with pytest.raises(BadData, match="empty"):
        question_answer(words, ["q"], ["  "])
    with pytest.raises(BadData, match="chat template"):
        question_answer(words, ["q"], ["cat"], template="chat")
    with pytest.raises(BadData, match="max_length"):
        question_answer(words, ["where does p1 live ?"], ["cat"], template="{question}", max_length=3)
    with pytest.raises(BadData, match="{question}"):
        question_answer(words, ["q"], ["cat"], template="nothing")


def test_no_padding_token_is_no_obstacle():
    words = words_tokenizer()
    import copy

    bare = copy.deepcopy(words)
    bare.pad_token = None
    data = question_answer(bare, ["where does p1 live ?"], ["cat"], template="{question}")
    assert data.pad == bare.eos_token_id


def small_case(**changes):
    data = changes.pop("data", None) or language_table(range(6))
    net = changes.pop("model", None) or tiny_llama(len(words_tokenizer()), width=16)
    return Case(net, data, requests.where("person", ">=", 5), task="language", **changes)


def test_a_foreign_tokenizer_is_found_wherever_its_tokens_are():
    data = language_table(range(40))
    tokens = [list(row) for row in data.tokens]
    tokens[71][-2] = 5000  # no first, shortest or longest row
    with pytest.raises(BadData, match="found 5000"):
        small_case(data=TextData(tokens, data.starts, data.tokenizer, person=data.column("person")))


def test_a_forgotten_text_that_is_also_kept_is_refused_with_ids():
    data = language_table(range(6))
    twice = TextData([*data.tokens, data.tokens[-1]], [*data.starts, data.starts[-1]], data.tokenizer,
                     person=[*data.column("person").tolist(), 0])  # fmt: skip
    with pytest.raises(BadRequest, match="rows \\[18\\]"):
        small_case(data=twice)


def test_a_foreign_tokenizer_and_rows_beyond_the_context_are_refused():
    with pytest.raises(BadData, match="vocabulary of 20"):
        small_case(model=tiny_llama(20, width=16))
    data = language_table(range(6))
    long = TextData(
        [*data.tokens, [3] * 70], [*data.starts, 1], data.tokenizer, person=[*data.column("person").tolist(), 0]
    )
    with pytest.raises(BadData, match="at most 64 tokens"):
        small_case(data=long)


def test_a_model_that_is_no_language_model_is_refused():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids, attention_mask=None):
            return ids.float()

    with pytest.raises((BadModel, BadData), match="causal language model"):
        small_case(model=Flat())


def test_a_plain_module_that_returns_all_logits_works_as_well():
    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = torch.nn.Embedding(30, 30)

        def forward(self, ids):
            return self.table(ids)

    data, net = table(), Bigram()
    batch = everything(data)
    expected = F.cross_entropy(net.table(torch.tensor([4, 5, 6])), torch.tensor([5, 6, 1]))
    assert torch.allclose(TASK.loss(TASK.forward(net, batch), batch)[0], expected, atol=1e-6)


@torch.enable_grad()
def test_models_come_back_as_ordinary_folders(tmp_path):
    import transformers

    from expunge import unlearn
    from expunge.cases.loading import load_model

    case = small_case()
    outcome = unlearn(case, "grad_ascent", lr=1e-3, epochs=1, run=tmp_path / "run", floor=None)
    folder = tmp_path / "run" / "model"
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(case.model)
    for name, value in outcome.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert torch.equal(load_model(folder).lm_head.weight, outcome.model.lm_head.weight)
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == len(words_tokenizer())
