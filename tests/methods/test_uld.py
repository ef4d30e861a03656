"""ULD and Who's Harry Potter: the rules by hand, the guard as a model like its base, the assistant as the paper's."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from expunge import unlearn
from expunge.audits.attacks.unwrapping import innermost
from expunge.errors import BadData, BadModel, BadSetting
from expunge.parts.combined import OUT_OF_REACH, CombinedLogits, Difference, Excess, SecondLogits
from expunge.parts.guarded import Guarded, cache_keyword, companion, differing, load_guard
from expunge.tasks import Language
from tiny_language import language_case, llama
from toys import toy

pytest.importorskip("transformers")


# -- the rules ---------------------------------------------------------------------------------------------------------
def logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.3])
def test_a_uniform_assistant_and_a_weight_of_zero_leave_the_model_as_it_was(threshold):
    z = logits(0, 5, 4, 30)
    uniform = torch.full_like(z, 7.5)
    assert (Difference(-2.0, threshold)(z, uniform).softmax(-1) - z.softmax(-1)).abs().max() < 1e-12
    assert torch.equal(Difference(0.0, threshold)(z, logits(1, 5, 4, 30)), z)


def test_the_filter_by_hand_and_it_never_removes_the_likeliest():
    p = torch.tensor([[0.6, 0.3, 0.09, 0.009, 0.001]], dtype=torch.float64)
    # k = max(1, floor(.05 * 5)) = 1: the threshold is min(log .6, log .6 + log .05) = log .03
    assert Difference(threshold=0.05).plausible(p.log()).tolist() == [[True, True, True, False, False]]
    # k = floor(.8 * 5) = 4: the 4th largest, .009, is below .6 * .8
    assert Difference(threshold=0.8).plausible(p.log()).tolist() == [[True, True, True, True, False]]
    for threshold in (0.0, 1e-6, 0.01, 0.5, 0.99):
        z = logits(2, 200, 12)
        live = Difference(threshold=threshold).plausible(z)
        assert live.gather(1, z.argmax(1, keepdim=True)).all()


def test_the_difference_by_hand():
    z = torch.tensor([0.6, 0.3, 0.09, 0.009, 0.001], dtype=torch.float64).log()
    g = torch.tensor([2.0, 0.0, 1.0, 50.0, 3.0], dtype=torch.float64)
    centred = g - g.mean()
    rule = Difference(-0.5, 0.05)
    expected = torch.cat([z[:3] - 0.5 * centred[:3], z[3:]])  # implausible tokens keep the base's logit
    assert torch.allclose(rule(z, g), expected)
    assert torch.allclose(
        rule(z, g, generating=True), torch.cat([expected[:3], torch.full((2,), OUT_OF_REACH).double()])
    )
    with pytest.raises(BadSetting):
        Difference(threshold=1.0)


def test_the_excess_by_hand():
    base, more = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])
    assert Excess(0.5)(base, more).tolist() == [0.0, 2.0, 3.0]
    assert torch.equal(Excess(3.0)(base, base), base)


# -- the guard is a model like its base --------------------------------------------------------------------------------
@functools.cache
def pair() -> tuple[nn.Module, CombinedLogits]:
    torch.manual_seed(0)
    base = llama(4)
    with torch.no_grad():
        for p in base.parameters():
            p.mul_(8)
    other = companion(base, 2)
    with torch.no_grad():
        for p in other.model.layers.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return base, CombinedLogits(base, other, Difference(-2.0, 0.01), 2)


PROMPTS = torch.tensor([[0, 0, 7, 9, 12, 4], [5, 30, 8, 21, 3, 6], [11, 17, 25, 39, 14, 10]])
MASK = (PROMPTS != 0).long()


def test_the_call_is_the_bases_with_combined_logits():
    base, guard = pair()
    assert (
        isinstance(guard, Guarded)
        and guard.config is base.config
        and guard.get_input_embeddings() is base.model.embed_tokens
    )
    with torch.no_grad():
        result = guard(input_ids=PROMPTS, attention_mask=MASK, output_hidden_states=True)
        plain = base(input_ids=PROMPTS, attention_mask=MASK, output_hidden_states=True)
        second = guard.other(input_ids=PROMPTS, attention_mask=MASK)
        assert type(result) is type(plain) and torch.equal(result.hidden_states[-1], plain.hidden_states[-1])
        assert torch.equal(result.logits, guard.rule(plain.logits, second.logits))
        labelled = guard(input_ids=PROMPTS, labels=PROMPTS)
        rows = labelled.logits[:, :-1].log_softmax(-1).gather(2, PROMPTS[:, 1:, None])
        assert torch.allclose(labelled.loss, -rows.mean(), atol=1e-5)
        assert torch.equal(guard(PROMPTS).logits, guard(input_ids=PROMPTS).logits)


def slow(base: nn.Module, guard: CombinedLogits, steps: int) -> Tensor:
    """Greedy decoding from whole passes, no cache anywhere."""
    ids, mask = PROMPTS, MASK
    for _ in range(steps):
        where = (mask.cumsum(1) - 1).clamp_min(0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": where, "use_cache": False}
        z = guard.rule(base(**given).logits[:, -1], guard.other(**given).logits[:, -1], generating=True)
        ids = torch.cat([ids, z.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
    return ids


@torch.no_grad()
def test_generation_is_the_slow_loop_and_not_the_bases():
    base, guard = pair()
    settings = {
        "attention_mask": MASK,
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = slow(base, guard, 8)
    assert torch.equal(guard.generate(PROMPTS, **settings), expected)
    assert not torch.equal(base.generate(PROMPTS, **settings), expected)
    assert torch.equal(guard.generate(input_ids=PROMPTS, use_cache=False, **settings), expected)
    prompts = [[t for t in row if t] for row in PROMPTS.tolist()]
    assert Language().generate(guard, prompts, 8) == expected[:, 6:].tolist()


@torch.no_grad()
def test_the_second_network_has_a_cache_of_its_own_and_notices_beams_that_change_places():
    _, guard = pair()
    lengths = []
    hook = guard.other.model.register_forward_pre_hook(
        lambda _m, _a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    settings = {
        "attention_mask": MASK,
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    guard.generate(PROMPTS, **settings)
    assert lengths == [6, 1, 1, 1, 1]
    hook.remove()
    own = SecondLogits(guard.other, guard.rule, MASK)
    own.logits(PROMPTS)
    grown = torch.cat([PROMPTS[[1, 0, 2]], torch.tensor([[4], [5], [6]])], 1)  # rows change places
    own.mask = MASK[[1, 0, 2]]
    moved = own.logits(grown)
    assert torch.allclose(moved, SecondLogits(guard.other, guard.rule, MASK[[1, 0, 2]]).logits(grown), atol=1e-5)
    assert guard.generate(PROMPTS, num_beams=3, **settings).shape == (3, 11)


@torch.no_grad()
def test_two_caches_travel_as_one_through_direct_calls():
    base, guard = pair()
    key = cache_keyword(base)
    first = guard(input_ids=PROMPTS[1:, :4], use_cache=True)
    rest = guard(input_ids=PROMPTS[1:, 4:], use_cache=True, **{key: getattr(first, key)})
    whole = guard(input_ids=PROMPTS[1:]).logits
    assert (torch.cat([first.logits, rest.logits], 1) - whole).abs().max() < 1e-4
    foreign = getattr(base(input_ids=PROMPTS[1:, :4], use_cache=True), key)
    with pytest.raises(BadSetting, match="cache"):
        guard(input_ids=PROMPTS[1:, 4:], use_cache=True, **{key: foreign})


@torch.no_grad()
def test_saved_as_a_reference_to_the_base_and_the_blocks_alone(tmp_path):
    base, guard = pair()
    assert guard.other.model.embed_tokens.weight is base.model.embed_tokens.weight  # shared, not copied
    assert all(".layers." in name for name in guard.tensors()) and len(guard.tensors()) == 2 * 9
    guard.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["guard.json", "guard.safetensors"]
    again = load_guard(tmp_path, copy.deepcopy(base))
    assert torch.equal(again(PROMPTS).logits, guard(PROMPTS).logits)
    with pytest.raises(BadModel, match="made for"):
        load_guard(tmp_path, llama(4))
    copied = copy.deepcopy(guard)
    assert copied.other.lm_head.weight is copied.base.lm_head.weight
    (tmp_path / "guard.safetensors").write_bytes(b"x")
    with pytest.raises(BadModel, match="damaged"):
        load_guard(tmp_path, base)


def test_a_companion_of_fewer_blocks_is_the_model_up_to_there():
    base, _ = pair()
    two = companion(base, 2)
    assert two.config.num_hidden_layers == 2 and base.config.num_hidden_layers == 4
    with torch.no_grad():
        states = base(PROMPTS, output_hidden_states=True).hidden_states[2]
        assert torch.allclose(two(PROMPTS).logits, base.lm_head(base.model.norm(states)), atol=1e-5)
    assert differing(two, base) == {}


# -- the assistant -----------------------------------------------------------------------------------------------------
def test_only_the_assistants_blocks_are_trained_and_the_base_stays():
    case = language_case(llama(4))
    outcome = unlearn(case, "uld", floor=None, epochs=2, batch_size=4)
    guard = outcome.model
    assert all(torch.equal(v, guard.base.state_dict()[k]) for k, v in case.model.state_dict().items())
    assert guard.blocks == 1 and len(guard.other.model.layers) == 1  # a quarter of four
    own = guard.tensors()
    assert len(own) >= 7 and all(name.startswith("model.layers.0.") for name in own)
    assert "z_f-0.8·z_g" in outcome.formula and outcome.record["method"]["family"] == "guarded"
    pytest.importorskip("peft")
    adapted = unlearn(case, "uld", floor=None, epochs=2, batch_size=4, rank=2, blocks=2).model
    for name, tensor in adapted.tensors().items():
        change = (tensor - case.model.state_dict()[name]).double()
        assert tensor.dim() == 2 and torch.linalg.matrix_rank(change, atol=1e-5) <= 2
    same = unlearn(case, "uld", floor=None, epochs=2, batch_size=4).model
    assert torch.equal(same(PROMPTS).logits, guard(PROMPTS).logits)


def test_the_loss_is_reversed_and_counts_answer_tokens_only():
    """One full-batch step without momentum: the assistant moves by the gradient of CE[forget] + 5 KL(U || g)[retain]."""
    from expunge.engine import Workbench
    from expunge.methods.guarded.uld import assistant_of
    from expunge.parts import Auxiliary, fit, from_uniform
    from expunge.parts.plan import Optimizer, Plan, Term

    case = language_case(llama(2))
    bench = Workbench(case, copy.deepcopy(case.model))
    plan = Plan(Term(fit(), "forget"), Term(from_uniform(), "retain", 5.0), epochs=1, batch_size=100, mode="eval",
                trains=Auxiliary("assistant", functools.partial(assistant_of, blocks=1)),
                optimizer=Optimizer("sgd", lr=0.1))  # fmt: skip
    from expunge.engine import run_plan

    run_plan(plan, bench)
    g = assistant_of(case, 0, 1)
    total = torch.zeros(())
    for split, weight in (("forget", 1.0), ("retain", 5.0)):
        rows, value = case.split(split), []
        for i in rows.ids.tolist():
            tokens, start = torch.tensor([rows.data.tokens[i]]), rows.data.starts[i]
            log_p = g(tokens).logits[0].log_softmax(-1)[start - 1 : -1]
            if split == "forget":
                value.append(-log_p.gather(1, tokens[0, start:, None]).mean())
            else:
                u = 1 / log_p.shape[-1]
                value.append((u * (torch.tensor(u).log() - log_p)).sum(-1).mean())
        total = total + weight * torch.stack(value).mean()
    p = g.model.layers[0].mlp.up_proj.weight
    expected = p - 0.1 * torch.autograd.grad(total, p)[0]
    after = bench.networks["assistant"].model.layers[0].mlp.up_proj.weight
    assert torch.allclose(after, expected, atol=1e-6)


def test_a_killed_assistant_goes_on_to_the_same_tensors(tmp_path):
    case, reports, settings = language_case(llama(2)), [], {"epochs": 3, "batch_size": 2}

    class Killed(Exception):
        pass

    def kill(*_):
        reports.append(1)
        if len(reports) == 3:
            raise Killed

    whole = unlearn(case, "uld", floor=None, **settings)
    assert whole.record["updates"] > 3
    with pytest.raises(Killed):
        unlearn(case, "uld", floor=None, run=tmp_path, checkpoint_steps=1, report=kill, **settings)
    assert (tmp_path / "checkpoint.safetensors").exists()
    resumed = unlearn(case, "uld", floor=None, run=tmp_path, report=lambda *_: reports.append(1), **settings)
    assert len(reports) - 3 < whole.record["updates"]  # not from the start
    ours, theirs = resumed.model.tensors(), whole.model.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_paraphrases_and_wrong_answers_come_from_a_probe():
    from expunge.cases.text import TextData

    data = TextData([[3, 4, 5, 6, 2], [3, 4, 5, 7, 2], [3, 4, 5, 8, 2]], [3, 3, 3], pad=0, role=[0, 1, 2])
    case = language_case(llama(2), probes={"more": data})
    plain = unlearn(case, "uld", floor=None, epochs=1)
    more = unlearn(case, "uld", floor=None, epochs=1, paraphrases="more", wrong="more")
    assert len(plain.record["history"][-1]["losses"]) == 2
    assert {k.split("[")[1] for k in more.record["history"][-1]["losses"]} == {
        "forget]", "retain]", "paraphrases]", "wrong answers]"
    }  # fmt: skip
    with pytest.raises(BadData, match="probe"):
        unlearn(case, "uld", floor=None, epochs=1, paraphrases="none")


# -- what it does, on digits -------------------------------------------------------------------------------------------
DIGITS = {"lr": 0.05, "epochs": 60, "batch_size": 32, "retain_batch_size": 64, "weight": -3.0, "threshold": 0.0}


@functools.cache
def guarded_digits():
    return unlearn(toy("class").case, "uld", floor=None, **DIGITS)


def test_the_class_is_gone_the_others_stay_and_taking_the_guard_off_brings_it_back():
    t = toy("class")
    guard = guarded_digits().model
    assert t.accuracy(guard, "holdout") <= 0.02 and t.accuracy(t.original, "holdout") > 0.9
    assert t.accuracy(guard, "test") >= t.accuracy(t.original, "test") - 0.01
    inside = innermost(guard, t.case)
    forget = t.case.split("forget")
    batch = forget.data.fetch(forget.ids)
    assert inside is guard.base and torch.equal(inside(batch["inputs"]), t.original(batch["inputs"]))
    assert list(guard.tensors()) == ["4.weight", "4.bias"]  # the small head


def test_forgetting_grows_with_the_weight():
    t, guard = toy("class"), guarded_digits().model
    scores = [
        t.measure(CombinedLogits(guard.base, guard.other, Difference(w, 0.0)), "forget")["loss"]
        for w in (0, -0.5, -1, -2)
    ]
    assert scores[0] == pytest.approx(t.measure(t.original, "forget")["loss"], abs=1e-6)
    assert scores == sorted(scores) and scores[-1] > scores[0] + 1


def test_a_run_folder_holds_the_guard_and_reads_it_back(tmp_path):
    t = toy("class")
    first = unlearn(t.case, "uld", floor=None, run=tmp_path, **DIGITS)
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert {"guard.json", "guard.safetensors"} <= names and "model.safetensors" not in names
    again = unlearn(t.case, "uld", floor=None, run=tmp_path, **DIGITS)
    assert again.record == first.record  # read back, not run again: the clock would differ
    x = t.case.test.column("inputs")[:20]
    assert torch.equal(again.model(x), first.model(x))


def test_whp_pushes_down_what_the_reinforced_model_likes():
    t = toy("class")
    outcome = unlearn(
        t.case, "whp", floor=None, alpha=20.0, lr=0.01, epochs=10, optimizer="sgd", batch_size=32, clip=None
    )
    guard = outcome.model
    x = t.case.test.column("inputs")[:50]
    with torch.no_grad():
        f, r = t.original(x), guard.other(x)
        assert torch.allclose(guard(x), f - 20.0 * torch.relu(r - f), atol=1e-5)
    assert t.measure(guard.other, "forget")["loss"] < t.measure(t.original, "forget")["loss"]
    assert t.accuracy(guard, "holdout") < 0.5 * t.accuracy(t.original, "holdout")
    assert innermost(guard, t.case) is guard.other  # whoever unwraps it finds more than there was
