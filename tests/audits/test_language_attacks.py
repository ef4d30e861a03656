"""Attacks on language models: formulas by hand, planted knowledge that they must find, and a retrained model that they must not
accuse."""

import copy
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from tests.toys import tiny_llama, toy, words_tokenizer
from torch import nn

from expunge import requests, unlearn
from expunge.audits import Subjects, run_checks
from expunge.audits.attacks import prompts, reintroduction, rows
from expunge.audits.attacks.activations import decoder, lens_output, streams
from expunge.audits.attacks.budget import Attacked, Budget, forget_scores
from expunge.audits.attacks.direction_ablation import DirectionAblation, directions, outliers, without
from expunge.audits.attacks.excess import excess
from expunge.audits.attacks.lens import HeadProjection, LogitLens, candidates
from expunge.audits.attacks.prompt_probe import PromptProbe
from expunge.audits.attacks.pruning import TargetedPruning, importance, set_difference
from expunge.audits.attacks.quantisation import Quantisation, ends, matrices, rounded
from expunge.audits.attacks.recovery import Recovery
from expunge.audits.attacks.reintroduction import Ladder
from expunge.audits.attacks.relearning import Relearning, RetrainingOnParts
from expunge.audits.attacks.soft_prompt import SoftPrompt, filled, soft_tokens
from expunge.audits.attacks.suffix import SuffixSearch, greedy_search, typed_by
from expunge.audits.battery import default_attacks, find_attacks, judge
from expunge.audits.intention import observed_intention
from expunge.audits.profiles import run_profile
from expunge.cases.data import Split
from expunge.cases.text import TextData
from expunge.engine import fit
from expunge.errors import BadData, BadSetting, UnmetNeed
from expunge.records.audit import Auditor

BUDGET = Budget()


@cache
def second():
    return fit(toy("language").case, "retain", 7)


@cache
def steered():
    """The original with a vector added to the stream in its first block: silent at the end, unchanged inside."""
    model = copy.deepcopy(toy("language").original)
    down = decoder(model).blocks[0].mlp.down_proj
    vector = torch.randn(down.out_features, generator=torch.Generator().manual_seed(1))
    down.bias = nn.Parameter(30 * vector / vector.norm())
    return model


SHARED: list[Subjects] = []
MEMORY: dict = {}
"""What audits of one case share: passes and attacks of all models but the unlearned one run once for all tests here."""


def subjects(unlearned):
    found = toy("language")
    made = Subjects(found.case, found.original, unlearned, found.retrained, second(), resamples=50)
    for other in SHARED[:]:
        made.share(other)
    SHARED.append(made)
    return made


def score(model, case=None):
    case = case or toy("language").case
    return float(forget_scores(model, case, case.split("forget")).mean())


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- weights -----------------------------------------------------------------------------------------------------------
def test_rounding_in_groups_by_hand_gives_each_group_its_own_step():
    """3 bits, groups of 2 inputs: steps 3/3 and 0.6/3; the last group has one input and keeps it."""
    weight = torch.tensor([[3.0, 1.4, 0.6, -0.29, 0.05]])
    assert torch.allclose(rounded(weight, 3, group=2), torch.tensor([[3.0, 1.0, 0.6, -0.2, 0.05]]), atol=1e-6)
    assert torch.equal(rounded(weight, 3, group=99), rounded(weight, 3))
    with pytest.raises(BadSetting, match="groups"):
        rounded(weight, 3, group=0)


def test_quantisation_of_a_language_model_leaves_embeddings_head_and_norms():
    model = tiny_llama(40, width=48)
    got = Quantisation(4).run(model, None, BUDGET, 0)
    before, after = dict(model.named_parameters()), dict(got.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "proj" in name}
    name = next(name for name in moved if "down" in name)
    assert torch.equal(after[name], rounded(before[name], 4, group=32))
    assert len(ends(model)) == 1 and not ends(nn.Linear(2, 2))  # tied: one table is both ends


def test_rounding_brings_back_what_steps_below_half_a_bin_hid():
    """The positive control: ascent that never leaves the bins of the 4-bit grid is undone by rounding to it."""
    case, split = toy("language").case, toy("language").case.split("forget")
    on_grid = Quantisation(4).run(toy("language").original, case, BUDGET, 0)
    hidden = copy.deepcopy(on_grid)
    inner = [p for p, _ in matrices(hidden) if id(p) not in ends(hidden)]
    centre, room = [p.detach().clone() for p in inner], []
    for p in inner:
        groups = p.detach().split(32, dim=1)
        largest = [g.abs().amax(1, keepdim=True).expand_as(g) for g in groups]
        free = [torch.where(g.abs() < m, 0.45 * m / 7, torch.zeros(())) for g, m in zip(groups, largest, strict=True)]
        room.append(torch.cat(free, dim=1))  # the largest entry of each group stays, so the grid does, too
    batch = next(split.batches(64))
    for _ in range(12):
        loss = case.task.loss(case.task.forward(hidden, batch), batch).mean()
        for p, g, c, r in zip(inner, torch.autograd.grad(loss, inner), centre, room, strict=True):
            p.data = (p + 0.2 * r * g.sign()).detach().clamp(c - r, c + r)
    back = Quantisation(4).run(hidden, case, BUDGET, 0)
    assert score(hidden) < score(on_grid) - 0.3
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(back.parameters(), on_grid.parameters(), strict=True))
    assert abs(score(back) - score(on_grid)) < 1e-3


def test_set_difference_is_top_of_one_and_not_top_of_the_other():
    forget = [torch.tensor([[9.0, 8.0], [1.0, 2.0]]), torch.tensor([[7.0, 3.0]])]
    use = [torch.tensor([[9.0, 1.0], [2.0, 3.0]]), torch.tensor([[0.0, 8.0]])]
    masks = set_difference(forget, use, q=0.5, p=0.34)  # top 3 of 6: 9, 8, 7; top 2 of use: 9, 8
    assert masks[0].tolist() == [[False, True], [False, False]] and masks[1].tolist() == [[True, False]]


def test_importance_is_weight_times_gradient_by_the_slow_loop():
    case = toy("language").case
    rows_ = case.split("forget").subset(torch.arange(5))
    model = copy.deepcopy(case.model)
    inner = [p for p, _ in matrices(model)][:3]
    got = importance(model, case, inner, rows_)
    model.zero_grad()
    for i in range(5):
        batch = next(rows_.subset(torch.tensor([i])).batches(1))
        (case.task.loss(case.task.forward(model.eval(), batch), batch).sum() / 5).backward()
    for p, found in zip(inner, got, strict=True):
        assert torch.allclose(found, (p * p.grad).abs(), atol=1e-6)


def test_targeted_pruning_never_costs_more_than_it_may():
    case = toy("language").case
    pruned = TargetedPruning(forget=(0.02,), use=(0.1,)).run(steered(), case, BUDGET, 0)
    utility = [case.task.evaluate(m, case.split("retain").batches())["probability"] for m in (steered(), pruned)]
    assert utility[1] >= utility[0] - 0.02 - 1e-6
    assert score(pruned) >= score(steered()) - 1e-6


# -- inside ------------------------------------------------------------------------------------------------------------
def test_streams_are_before_the_final_norm_and_the_last_lens_is_the_output():
    """The list of hidden states has the final norm in its last entry already: reading it through the lens would norm twice."""
    case = toy("language").case
    parts, split = decoder(case.model), case.split("forget")
    batch, stream = next(streams(case.model, case.task, split))
    with torch.no_grad():
        out = case.model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    assert len(stream) == len(parts.blocks) + 1
    assert torch.allclose(parts.norm(stream[-1]), out.hidden_states[-1], atol=1e-5)
    assert not torch.allclose(stream[-1], out.hidden_states[-1], atol=1e-2)
    expected = case.task.forward(case.model, batch).prediction
    assert torch.allclose(lens_output(parts, stream[-1], batch).prediction, expected, atol=1e-4)
    _, after = next(streams(case.model, case.task, split, place="after_attention"))
    _, attention = next(streams(case.model, case.task, split, place="attention"))
    _, mlp = next(streams(case.model, case.task, split, place="mlp"))
    assert torch.allclose(stream[0] + attention[0], after[0], atol=1e-5)
    assert torch.allclose(after[0] + mlp[0], stream[1], atol=1e-5)


def test_candidates_respect_k_and_deltas_take_both_ends():
    """The released code ignores its k and takes 5."""
    logits = torch.tensor([[[0.0, 1.0, 2.0, 3.0, -9.0]], [[3.0, 1.0, 2.0, -3.0, -9.0]]])  # 2 layers, 1 place, 5 tokens
    assert candidates(logits, 1).tolist() == [[3, 0]]
    assert sorted(set(candidates(logits, 2)[0].tolist())) == [0, 2, 3]
    assert sorted(candidates(logits, 1, delta=True)[0].tolist()) == [0, 3]  # 0 rises most, 3 falls most
    with pytest.raises(BadSetting):
        candidates(logits, 6)
    assert HeadProjection(k=3).cost(toy("language").case, BUDGET)["candidates"] == 3 * 2


def test_head_projection_is_the_slow_loop_and_a_canary_in_a_middle_layer_is_found():
    case, model = toy("language").case, steered()
    attack = HeadProjection(k=2, layers=(0,))
    got = attack.scores(model, case, BUDGET, 0)
    parts, expected = decoder(model), []
    for batch, stream in streams(model, case.task, case.split("forget")):
        logits = lens_output(parts, stream[1], batch).prediction
        for row, truth in zip(logits, case.task.answers_at(batch), strict=True):
            own = [int(t) for t in truth if t != -100]
            expected.append(np.mean([t in row[i].topk(2).indices.tolist() for i, t in enumerate(own)]))
    assert np.allclose(got, expected)  # the original knows every token here
    wiped = copy.deepcopy(toy("language").original)  # the last block turns what the first one knows upside down
    with torch.no_grad():
        for part in (decoder(wiped).blocks[-1].mlp.down_proj, decoder(wiped).blocks[-1].self_attn.o_proj):
            part.weight.mul_(-4)
    lens = LogitLens().scores(wiped, case, BUDGET, 0).mean()
    assert lens > score(wiped) + 0.1 and HeadProjection().scores(wiped, case, BUDGET, 0).mean() > 0.8


def test_a_direction_of_unlearning_is_found_and_taken_out():
    case = toy("language").case
    assert score(steered()) < 0.3 < 0.9 < score(case.model)
    ways = directions(steered(), case, BUDGET, 0)
    bias = decoder(steered()).blocks[0].mlp.down_proj.bias.detach().double()
    assert abs(float(ways[0] @ (bias / bias.norm()))) > 0.99
    before = weights(steered())
    back = DirectionAblation().run(steered(), case, BUDGET, 0)
    assert score(back) > 0.8 and same(weights(steered()), before) and same(weights(back), before)
    _, stream = next(streams(without(steered(), {0: ways[0]}), case.task, case.split("forget")))
    assert (stream[1].double() @ ways[0]).abs().max() < 1e-3
    assert all(float(way.norm()) == 0 for way in directions(case.model, case, BUDGET, 0))  # no difference, no direction


def test_outlying_tokens_do_not_make_the_direction():
    tokens = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens[7] += 100
    assert outliers(tokens).nonzero().flatten().tolist() == [7]


def test_probe_finds_what_the_state_holds_and_not_shuffled_labels():
    """The first word of an answer is its person: the original decides it at the last prompt token, the retrained cannot."""
    found = toy("language")
    attack, control = PromptProbe(layers=(2,)), PromptProbe(layers=(2,), shuffle=True)
    known, unknown = (attack.scores(m, found.case, BUDGET, 0).mean() for m in (found.original, found.retrained))
    assert known > 0.5 > unknown + 0.3
    assert control.scores(found.original, found.case, BUDGET, 0).mean() < 0.2
    people = found.case.data.column("person")[found.case.split("forget").ids]
    folds = PromptProbe(group="person")._folds(found.case.split("forget"), 0)
    assert all(len(set(folds[people == p])) == 1 for p in people.unique())
    together = PromptProbe(layers=(2,), group="person").scores(found.original, found.case, BUDGET, 0)
    assert together.max() == 0.0  # no row of a person left to learn it from
    with pytest.raises(UnmetNeed):
        attack.run(found.original, found.case, BUDGET, 0)


# -- prompts -----------------------------------------------------------------------------------------------------------
def test_tokens_go_beside_the_question_and_answers_stay():
    case = toy("language").case
    split = case.split("forget")
    shape = rows.Frame(before=(9,), after=(8, 8))
    assert [shape.place([9, 1, 2, 8, 8], s) for s in ("start", "before", "after", "end")] == [0, 1, 3, 5]
    found = rows.frame(case)  # questions differ from their first word, and all end in a question mark
    mark = words_tokenizer()("?")["input_ids"]
    assert found.before == () and list(found.after) == mark
    new = rows.inserted(split, [5, 6], found, "after")
    data, old = rows.text_rows(new), rows.text_rows(split)
    assert data.answer_ids() == old.answer_ids(split.ids)
    assert all(
        p[-3:] == [5, 6, *mark] and p[:-3] == q[:-1]
        for p, q in zip(data.prompt_ids(), old.prompt_ids(split.ids), strict=True)
    )
    back = rows.rewritten(split, lambda question, rng: question, found)
    assert rows.text_rows(back).tokens == [old.tokens[i] for i in split.ids.tolist()]


def test_character_noise_comes_after_every_step():
    text, rng = "abcdefg", np.random.default_rng(0)
    noisy = prompts.every(3, "!")(text, rng)
    assert noisy == "abc!def!g"
    assert prompts.scattered(1.0, "!")("ab", rng) == "a!b!" and prompts.scattered(0.0)("ab", rng) == "ab"
    with pytest.raises(BadSetting):
        prompts.template("no place for it")


def test_every_variant_keeps_the_answer_and_none_holds_it():
    case = toy("language").case
    split, data = case.split("forget"), case.data
    asked = prompts.variants(case, 0)
    assert next(iter(asked)) == "plain" and {"german", "noise_3", "few_shot"} <= set(asked)
    answers = data.answer_ids(split.ids)
    for name, rows_ in asked.items():
        table = rows.text_rows(rows_)
        assert table.answer_ids(rows_.ids) == answers, name
        for prompt, answer in zip(table.prompt_ids(rows_.ids), answers, strict=True):
            assert str(answer[:-1])[1:-1] not in str(prompt), name


def test_soft_tokens_that_are_embeddings_are_these_tokens_and_carry_gradients():
    case = toy("language").case
    model, size = case.model, case.model.get_input_embeddings().weight.shape[0]
    split = case.split("forget").subset(torch.arange(4))
    own = torch.tensor([7, 3, 11])
    soft = rows.inserted(split, [size, size + 1, size + 2], rows.Frame(), "end")
    hard = rows.inserted(split, own.tolist(), rows.Frame(), "end")
    table = model.get_input_embeddings().weight.detach()
    vectors = table[own].clone().requires_grad_()
    a, b = (next(s.batches(4)) for s in (soft, hard))
    with soft_tokens(model, vectors):
        loss = case.task.loss(case.task.forward(model, a), a).mean()
        slope = torch.autograd.grad(loss, vectors)[0] @ table.T
    assert torch.allclose(loss, case.task.loss(case.task.forward(model, b), b).mean(), atol=1e-6)
    one_hot = nn.functional.one_hot(own, size).float().requires_grad_()  # the same by a product with the table
    with soft_tokens(model, one_hot @ table):
        loss = case.task.loss(case.task.forward(model, a), a).mean()
    assert torch.allclose(torch.autograd.grad(loss, one_hot)[0], slope, atol=1e-6)
    many = filled(a, torch.stack([own, own.flip(0)]), size)
    assert torch.equal(many["input_ids"][:4], b["input_ids"]) and len(many) == 8


def test_greedy_search_finds_the_best_tokens_it_may_type():
    """A loss that is a sum over places has its gradient as its table: the search must end in the least allowed entries."""
    costs = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    costs[0, 4], costs[1, 5], costs[2, 6] = -1.0, -1.0, -1.0
    allowed = torch.ones(20, dtype=torch.bool)
    allowed[4] = False
    seen = []

    def losses(many):
        seen.extend(many.tolist())
        return costs[torch.arange(3), many].sum(1)

    def search(typed=None):
        rng = torch.Generator().manual_seed(1)
        return greedy_search(
            losses, lambda tokens: costs.clone(), torch.zeros(3, dtype=torch.long), allowed, rng, 40, 16, 3, typed
        )

    best = costs[0].masked_fill(~allowed, 9).argmin()
    assert search().tokens == [int(best), 5, 6]
    seen.clear()
    found = search(lambda tokens: 5 not in tokens)
    assert 5 not in found.tokens and not any(5 in row for row in seen) and found.tokens[2] == 6
    assert found.history == sorted(found.history, reverse=True)
    assert found.queries == len(seen) + 40  # each candidate once, one gradient a step, the start counted among them
    nothing = search(lambda tokens: False)
    assert nothing.unchanged == 40 and nothing.loss == float("inf")


def test_what_cannot_be_typed_is_told_apart():
    typed = typed_by(words_tokenizer())
    inside = words_tokenizer()("where rome")["input_ids"]
    assert typed(inside) and not typed([2, *inside]) or typed([2])
    assert typed_by(None) is None


def test_soft_prompt_is_above_gcg_is_above_templates_on_the_same_items():
    """Each item searched apart on a model that never knew it: the prompt itself carries the answer in."""
    found = toy("language")
    few = found.case.with_(request=requests.samples(found.case.split("forget").ids[:3].tolist()))
    model = found.retrained
    template = np.max(list(prompts.PromptTemplates().all_scores(model, few, 0).values()), axis=0)
    gcg = SuffixSearch(each=True, tokens=4, steps=8, candidates=24, top=24).scores(model, few, BUDGET, 0)
    soft = SoftPrompt(each=True, tokens=4, steps=60).scores(model, few, BUDGET, 0)
    assert soft.mean() >= gcg.mean() >= template.mean() >= score(model, few)
    assert soft.mean() > score(model, few) + 0.2


def test_a_prompt_found_on_a_tenth_is_scored_on_the_rest_and_leaves_the_model():
    case = toy("language").case
    before, random = weights(case.model), torch.random.get_rng_state()
    for attack in (SoftPrompt(steps=2), SuffixSearch(steps=1, candidates=4)):
        searched, scored = attack.parts(case, BUDGET, 5)
        assert not set(searched.ids.tolist()) & set(scored.ids.tolist()) and len(searched) + len(scored) == 24
        assert torch.equal(case.split("forget").ids[attack.positions(case, BUDGET, 5)], scored.ids)
        first, again = (attack.scores(case.model, case, BUDGET, 5) for _ in range(2))
        assert np.array_equal(first, again) and len(first) == len(scored)
    assert same(weights(case.model), before) and torch.equal(torch.random.get_rng_state(), random)


# -- relearning --------------------------------------------------------------------------------------------------------
def test_retraining_on_parts_never_shows_the_scored_part(monkeypatch):
    case = toy("language").case
    attack = RetrainingOnParts(column="person", parts=4)
    people, part = case.data.column("person")[case.split("forget").ids].numpy(), attack.dealt(case)
    assert len(set(part)) == 4 and all(len(set(part[people == p])) == 1 for p in set(people))
    shown = []
    monkeypatch.setattr(
        RetrainingOnParts, "_tuned", lambda self, model, case, places, *a: shown.append(places) or model
    )
    scores = attack.scores(case.model, case, BUDGET, 0)
    assert np.allclose(scores, forget_scores(case.model, case, case.split("forget")), atol=1e-6)
    for number, places in enumerate(shown):
        assert set(part[places.numpy()]) == set(range(4)) - {number}


def test_adapters_of_relearning_are_merged_and_few_steps_move_little():
    case = toy("language").case
    tuned = Relearning(share=1.0, rank=4).run(steered(), case, Budget(steps=2), 0)
    assert type(tuned) is type(steered()) and weights(tuned).keys() == weights(steered()).keys()
    assert not same(weights(tuned), weights(steered()))


def test_recovery_by_hand():
    table = {
        "original": np.array([[0.8, 1.0], [0.8, 1.0]]), "unlearned": np.array([[0.1, 0.3], [0.5, 0.9]]),
        "retrained": np.array([[0.1, 0.1], [0.2, 0.2]]),
    }  # fmt: skip
    found = Recovery((0, 5), table)
    assert found.recovered() == pytest.approx([0.0, 0.5 / 0.7])
    assert found.steps_to(0.5) == 5 and found.steps_to(0.9) is None and found.steps_to(0.2) == 0
    best, at = found.excess()
    assert at == 5 and best.value == pytest.approx(0.5)


# -- context -----------------------------------------------------------------------------------------------------------
def test_rungs_hold_what_they_say():
    case = toy("language").case
    split, data = case.split("forget"), case.data
    names = [f"about p{p}" for p in data.column("person")[split.ids].tolist()]
    found = reintroduction.build(case, 0, {"hint": names})
    assert list(found.rows)[:2] == ["none", "hint"] and {"premises", "paraphrase"} <= set(found.missing)
    for i, answer in enumerate(data.answer_ids(split.ids)):
        spoken = str(answer[:-1])[1:-1]
        prompt = {level: str(rows.text_rows(r).prompt_ids(r.ids)[i]) for level, r in found.rows.items()}
        assert spoken in prompt["verbatim"] and all(
            spoken not in prompt[level] for level in ("none", "hint", "examples")
        )
        assert (
            str(reintroduction.others(case)[i][:-1])[1:-1] in prompt["counterfactual"]
            and spoken not in prompt["counterfactual"]
        )
    assert found.tokens["none"] == 0 and found.tokens["hint"] == 2
    assert abs(found.tokens["unrelated"] - found.tokens["verbatim"]) <= 1
    with pytest.raises(BadData, match="one per forget row"):
        reintroduction.build(case, 0, {"hint": ["one"]})
    with pytest.raises(BadSetting):
        reintroduction.build(case, 0, {"verbatim": names})


def test_ladder_quantities_by_hand():
    n = 40
    flat = lambda value: np.full(n, value)  # noqa: E731
    scores = {
        "original": {"none": flat(1.0), "hint": flat(1.0), "verbatim": flat(1.0)},
        "unlearned": {"none": flat(0.1), "hint": flat(0.6), "verbatim": flat(0.5)},
        "retrained": {"none": flat(0.1), "hint": flat(0.1), "verbatim": flat(0.9)},
    }
    ladder = Ladder(scores, {"none": 0.0, "hint": 4.0, "verbatim": 20.0})
    assert ladder.gain("unlearned", "hint") == pytest.approx(0.5)
    assert ladder.residual("hint").failed and ladder.residual("hint").value == pytest.approx(0.5)
    assert ladder.residual("none").passed
    assert ladder.cost("retrained") == 20 and ladder.cost("unlearned") is None and ladder.cost("original") == 0
    assert ladder.recovered("hint") == pytest.approx(0.5 / 0.9)
    lines = " ".join(ladder.lines())
    assert "residual knowledge: context" in lines and "content filter" in lines and "distorted" in lines


def test_a_filter_stops_leaks_and_blocks_little():
    made = subjects(toy("language").original)
    open_, _ = reintroduction.leak_rate(made, "none")
    people = [f"p{p}" for p in range(22, 30)]
    named = lambda text: any(name in text.split() for name in people)  # noqa: E731
    closed, blocked = reintroduction.leak_rate(made, "none", blocks_input=named)
    assert open_ > 0.9 and closed == 0 and blocked == 0


# -- verdicts ----------------------------------------------------------------------------------------------------------
def test_excess_is_paired_and_has_three_ends():
    rng = np.random.default_rng(0)
    easy = rng.random(200)
    assert excess(easy + 0.2, easy).failed and excess(easy, easy).passed and excess(easy - 0.2, easy).passed
    assert excess(easy[:10] + rng.normal(0.05, 0.1, 10), easy[:10]).result == "undecided"
    with pytest.raises(BadData):
        excess([1.0], [1.0, 2.0])


def test_the_battery_grows_with_the_kind_of_model():
    common, language = ({a.name for a in default_attacks(kind)} for kind in ("regression", "language"))
    assert (
        common < language
        and {"logit_lens", "direction_ablation", "soft_prompt", "prompt_templates"} <= language - common
    )
    assert [a.name for a in find_attacks(["gcg", "retraining_on_parts"], "language")] == ["gcg", "retraining_on_parts"]
    with pytest.raises(BadSetting):
        find_attacks(["gcg"], "regression")


ATTACKS = ["relearning", "quantisation_4", "logit_lens", "direction_ablation", "prompt_templates"]


def test_hidden_knowledge_is_suppressed_and_a_second_gold_is_not_accused():
    hidden = judge(subjects(steered()), ATTACKS, memory=MEMORY, resamples=200)
    assert hidden.verdict in ("suppressed", "over-forgotten", "collapsed")
    assert hidden.attacked["direction_ablation"].above(0.15) and hidden.worst_attack == "direction_ablation"
    assert judge(subjects(toy("language").original), ATTACKS[:2], memory=MEMORY, resamples=200).verdict == "retained"
    other = judge(subjects(second()), ATTACKS, memory=MEMORY, resamples=200)
    assert other.verdict in ("removed", "inconclusive")
    assert not any(value.above(0.15) for value in other.attacked.values())


def measured(made, names):
    from expunge.audits.attacks.budget import attacked

    return {a.name: attacked(made, a, BUDGET, MEMORY) for a in find_attacks(names, "language")}


def test_observed_intention_is_printed_beside_the_declared():
    names = [*ATTACKS, "quantisation_8"]
    found = {
        name: observed_intention(made := subjects(model), "removal", measured(made, names))
        for name, model in (("steered", steered()), ("original", toy("language").original), ("second", second()))
    }
    assert found["steered"].observed == "suppression"
    assert str(found["steered"]).startswith("claims removal, measured suppression: ")
    assert found["original"].observed == "none"
    assert found["second"].observed == "removal"
    made = subjects(second())
    kept = observed_intention(made, "removal", measured(made, names), reversible=True)
    assert kept.observed == "suppression"  # a component to take off: suppression with certainty
    short = observed_intention(made, "removal", {})
    assert short.observed == "undetermined" and "not measured: relearning" in str(short)
    untouched = Subjects(
        made.case, second(), second(), made.model("retrained"), second(), seed=made.seed
    )  # knew nothing of it
    idle = observed_intention(untouched, "removal", measured(untouched, names))
    assert idle.observed == "undetermined" and str(idle).endswith("not measured: what there was to forget")


IDS = ("A2", "A3", "A4", "B1", "B3", "C2", "C5", "D1", "D4", "E5", "F1", "F5", "H3", "H6")
SETTINGS = {"relearning_curve": {"steps": (3,)}, "rouge": {"splits": ("forget",), "new_tokens": 12}}


def checklist(unlearned, **more):
    return run_profile("open_problems", subjects(unlearned), Budget(steps=3), IDS, SETTINGS, **more)


def test_the_untouched_model_fails_the_checklist_and_a_second_gold_fails_nothing():
    original = checklist(toy("language").original)
    assert {"B1", "B3", "C2", "D1", "D4"} <= set(original.failed) and original["F1"].result == "pass"
    assert original["A3"].result == "not run" and "multi_hop" in original["A3"].reason
    assert original["B2"].reason == "outside the minimal battery of language"
    assert original["E5"].result == "not run" and original["H6"].result == "told"
    assert len(original.rows) == 40 and original["D1"].budget.startswith("steps=3")
    gold = checklist(second(), facts={"seconds": 2.0, "retrain_seconds": 8.0})
    assert gold.failed == () and gold["H3"].reason == "0.25 of retraining"
    assert "failed: none" in str(gold) and gold.as_dict()["failed"] == []


def test_a_random_model_passes_efficacy_and_fails_utility():
    case = toy("language").case
    report = run_profile("open_problems", subjects(case.fresh(3)), BUDGET, ("B1", "C2", "F1"))
    assert report["B1"].result == report["C2"].result == "pass" and report.failed == ("F1",)


def test_without_a_gold_rows_are_not_run_and_say_so():
    found = toy("language")
    report = run_profile("open_problems", Subjects(found.case, found.original, found.original), BUDGET, ("B1", "C5"))
    assert (
        report["B1"].result == "not run" and "not worse than" in report["B1"].reason and report["C5"].result == "told"
    )
    with pytest.raises(BadSetting, match="Z9"):
        run_profile("open_problems", subjects(second()), BUDGET, ("Z9",))
    with pytest.raises(BadSetting, match="profile"):
        run_profile("open_problem", subjects(second()))


def test_random_answers_are_not_found():
    """Forget rows with other rows' answers: the original does not know them, and no reading or asking makes it look so."""
    found = toy("language")
    data, ids = found.case.data, found.case.split("forget").ids.tolist()
    wrong = {row: data.answer_ids([ids[(i + 4) % len(ids)]])[0] for i, row in enumerate(ids)}
    tokens = [data.tokens[i][: data.starts[i]] + wrong[i] if i in wrong else data.tokens[i] for i in range(len(data))]
    other = TextData(tokens, data.starts, data.tokenizer, person=data.column("person"))
    case = found.case.with_(data=other)
    for attack in (LogitLens(), prompts.PromptTemplates()):
        a, b = (attack.scores(m, case, BUDGET, 0) for m in (found.original, found.retrained))
        assert not excess(a, b, 0.1).failed, attack.name


def test_checks_name_every_subject_and_their_numbers_are_the_attacks(monkeypatch):
    monkeypatch.setattr(prompts, "TEMPLATES", {"german": prompts.TEMPLATES["german"]})
    monkeypatch.setattr(prompts, "NOISE", (7,))
    made = subjects(steered())
    found = run_checks(
        made, ["prompt_generation", "worst_of_n", "odd_answers", "reintroduction"], {"worst_of_n": {"n": (1, 3)}}
    )
    by = {m.name: m for m in found}
    assert by["prompt_recall_worst"].original >= by["prompt_recall_mean"].original
    assert by["prompt_success"].original > 0.9 > by["prompt_success"].retrained + 0.3
    assert by["worst_of_3"].original >= by["worst_of_1"].original
    assert by["odd_answer_rate"].split == "retain" and by["odd_answer_rate"].original < 0.1
    assert by["score_none"].original == pytest.approx(score(toy("language").original), abs=1e-6)
    assert all(len(m.per_example["unlearned"]) == 24 for m in found if m.name.startswith("score_"))


def test_attacked_is_what_intention_reads():
    one = Attacked(np.ones(3), np.ones(3), np.zeros(3), np.full(3, 0.2))
    made = replace(one, unlearned=np.full(3, 0.1))
    found = observed_intention(subjects(second()), "removal", {"quantisation_4": made})
    row = next(c for c in found.criteria if c.name == "quantisation")
    assert row.value == pytest.approx(0.1) and row.limit == pytest.approx(0.2) and row.held
    assert isinstance(toy("language").case.split("forget"), Split)


def test_an_audit_prints_claim_and_measurement_and_saves_the_checklist(tmp_path):
    """On digits: the fine-tuned model still knows its class, whatever it claims."""
    found = toy("class")
    auditor = Auditor(
        found.case, gold=found.retrained, floor=fit(found.case, "retain", 2), checks=["forget_score"],
        attacks=["quantisation_8", "pruning_20"], profile="open_problems",
    )  # fmt: skip
    audit = auditor.audit(unlearn(found.case, "fine_tune", epochs=1))
    assert audit.intention.observed == "none" and "claims" in str(audit) and "failed: " in str(audit)
    seen = audit.results.verdict.numbers["observed_intention"]
    assert seen["observed"] == "none" and seen["sentence"].startswith("claims ")
    rows_ = {row["id"]: row for row in json.loads((audit.save(tmp_path / "run") / "profile.json").read_text())["rows"]}
    assert rows_["D1"]["result"] == rows_["D4"]["result"] == "fail" and rows_["H4"]["result"] == "told"
    assert rows_["E1"]["reason"] == "outside the minimal battery of classification"
    assert "measured: none" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(BadSetting, match="open_problems"):
        Auditor(found.case, gold=found.retrained, profile="open_problem")
