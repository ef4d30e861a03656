"""Prompts as variables: the simplex, the straight-through word, the words before a prompt, the scorer, and the adversary."""

from __future__ import annotations

import copy

import pytest
import torch

from expunge.engine.workbench import Workbench
from expunge.errors import BadSetting, UnmetNeed
from expunge.parts import Term, redirect
from expunge.parts.objectives.redirect import says
from expunge.parts.prompts import (
    denoising_errors,
    drawn_words,
    prompt,
    rows_added,
    straight_through,
    to_simplex,
    word_table,
)
from tiny_pipelines import class_case, text_case, tiny_class, tiny_text


def bisected(row: torch.Tensor) -> torch.Tensor:
    """The projection by bisection on the shift, as the official code does it."""
    low, high = row.min() - 1, row.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (row - middle).clamp(0, 1).sum() > 1 else (low, middle)
    return (row - middle).clamp(0, 1)


def test_the_projection_is_on_the_simplex_and_that_of_bisection():
    rng = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(30, 125, generator=rng) * s for s in (0.01, 1.0, 10.0)]).double()
    found = to_simplex(rows)
    assert torch.allclose(found.sum(-1), torch.ones(90).double()) and found.min() >= 0 and found.max() <= 1
    assert torch.allclose(found, torch.stack([bisected(row) for row in rows]), atol=1e-4)
    assert torch.allclose(to_simplex(found), found)  # what is on it stays
    inside = torch.full((3, 4, 8), 1 / 8)
    assert torch.equal(to_simplex(inside), inside)


def test_a_word_is_one_hot_forward_and_passes_the_clamped_gradient():
    weights = torch.full((2, 3, 5), 0.2, requires_grad=True)
    chosen = torch.tensor([[0, 4, 2], [1, 1, 3]])
    upstream = torch.linspace(-3, 3, 30).view(2, 3, 5)
    found = straight_through(weights, chosen)
    assert torch.equal(found, torch.nn.functional.one_hot(chosen, 5).float())
    found.backward(upstream)
    assert torch.equal(weights.grad, upstream.clamp(-1, 1))


def test_words_are_drawn_by_their_weights():
    weights = torch.tensor([[0.7, 0.3, 0.0]]).expand(4000, 3)
    counts = drawn_words(weights, torch.Generator().manual_seed(0)).bincount(minlength=3) / 4000
    assert counts[2] == 0 and abs(float(counts[0]) - 0.7) < 0.03


def test_own_words_before_a_shorter_prompt_give_the_plain_encoding_and_the_length_stays():
    model = tiny_text()
    whole, rest = model.conditions.of(["red a three"]), model.conditions.of(["a three"])
    own = word_table(model).weight[model.conditions.words("red")]
    with torch.no_grad():
        plain, spliced = model.encode(whole), model.encode(rest, prefix=own)
        assert torch.allclose(spliced, plain, atol=1e-6) and spliced.shape == model.encode(rest, own.repeat(4, 1)).shape
    # a full prompt loses as many of its last positions as the prefix is long
    full = model.conditions.of(["plain " * 20])
    table = word_table(model).weight
    spelled = torch.cat([table[full[:, 0]], own.repeat(3, 1), table[full[0, 1:-3]]])[None]
    with torch.no_grad():
        assert spelled.shape[1] == full.shape[1]
        assert torch.allclose(model.encode(full, prefix=own.repeat(3, 1)), model.encode(full, words=spelled), atol=1e-6)


def test_gradients_reach_the_words_and_no_weight():
    model = tiny_text().requires_grad_(False)
    weights = torch.full((1, 2, len(word_table(model).weight)), 1 / 100, requires_grad=True)
    prefix = straight_through(weights, torch.tensor([[5, 9]])) @ word_table(model).weight
    model.encode(model.conditions.of(["a red three"]), prefix).square().sum().backward()
    assert weights.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["text", "class"])
def test_errors_in_one_pass_are_those_of_the_loop(kind):
    model = tiny_text() if kind == "text" else tiny_class()
    rng = torch.Generator().manual_seed(0)
    clean = torch.randn(3, *model.shape, generator=rng)
    noise, times = torch.randn(3, 4, *model.shape, generator=rng), torch.tensor([10, 300, 600, 990])
    asked = model.conditions.of(["a red three", "a plain one", "red"] if kind == "text" else [1, 3, 5])
    with torch.no_grad():
        encoded = model.encode(asked)
        found = denoising_errors(model, clean, noise, times, encoded)
        absolute = denoising_errors(model, clean, noise, times, encoded, "l1")
        for i in range(3):
            for j, t in enumerate(times):
                kept = model.scheduler.alphas_cumprod[t]
                noisy = kept.sqrt() * clean[i] + (1 - kept).sqrt() * noise[i, j]
                difference = model(noisy[None], t, encoded[i : i + 1])[0] - noise[i, j]
                assert float(found[i, j]) == pytest.approx(float(difference.square().mean()), rel=1e-4)
                assert float(absolute[i, j]) == pytest.approx(float(difference.abs().mean()), rel=1e-4)


def test_added_rows_are_read_in_the_place_of_ids_beyond_the_table():
    model = tiny_class()
    table = model.unet.class_embedding
    own = table.weight[[3, 7]].detach().clone().requires_grad_()
    x, t = torch.randn(4, *model.shape, generator=torch.Generator().manual_seed(0)), torch.tensor(100)
    with rows_added(table, own):
        mixed = model(x, t, torch.tensor([11, 2, 12, 10]))
    assert torch.allclose(mixed, model(x, t, torch.tensor([3, 2, 7, 10])), atol=1e-6)
    mixed.sum().backward()
    assert bool((own.grad.abs().sum(1) > 0).all())


# -- the adversary -----------------------------------------------------------------------------------------------------
GOAL = Term(redirect("own", reference="original"), on="forget")


def attacked(bench, seed=1, moved=True, **settings):
    """(step, adversary, harm) on a network that differs from the original."""
    if moved:
        with torch.no_grad():
            for p in bench.model.text_encoder.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    rows = bench.splits["forget"]
    batch = bench.fill(rows.data.fetch(rows.ids[:4]))
    step = bench.step(bench.task.prepare(batch, torch.Generator().manual_seed(seed)), "forget")
    return step, prompt(GOAL, **settings), lambda s: -GOAL.objective(s).mean()


def test_the_attack_lowers_its_goal_on_fixed_draws_and_leaves_no_gradient():
    case = text_case()
    bench = Workbench(case, copy.deepcopy(case.model))
    step, adversary, harm = attacked(bench, steps=40, lr=0.1, tokens=2)
    still = {n: p.detach().clone() for n, p in bench.model.named_parameters()}

    def error(words):  # five fixed draws
        total = 0.0
        for number in range(5):
            batch = bench.task.prepare(
                bench.fill(step.batch.__class__(step.batch.ids, {
                    k: v for k, v in step.batch.columns.items() if k not in ("noise", "level")
                })),
                torch.Generator().manual_seed(100 + number),
            )  # fmt: skip
            own = bench.task.forward(bench.model, batch.with_columns(prefix=words))
            other = says(step, "original", batch)
            total += float(bench.task.divergence(own, other, batch).mean())
        return total / 5

    with torch.no_grad():
        start = prompt(GOAL, steps=0, tokens=2).found(step, harm)
        found = adversary.found(step, harm)
        assert error(found) < 0.9 * error(start)
    assert found.shape == (4, 2, 64)
    assert all(p.grad is None and torch.equal(p, still[n]) for n, p in bench.model.named_parameters())
    assert [p.requires_grad for p in bench.model.parameters()] == [p.requires_grad for p in case.model.parameters()]


def test_words_before_the_prompt_are_not_put_to_the_original():
    case = text_case()
    bench = Workbench(case, copy.deepcopy(case.model))
    step, *_ = attacked(bench, moved=False)
    words = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0))
    hard = step.again()
    hard.batch = step.batch.with_columns(prefix=words)
    plain, other = says(step, "original", step.batch), says(hard, "original", hard.batch)
    assert torch.equal(plain.prediction, other.prediction)
    assert float(GOAL.objective(step).detach().max()) < 1e-10  # the same network asked the same
    assert float(GOAL.objective(hard).detach().min()) > 1e-6


def test_gradients_add_up_as_in_the_released_code_or_not():
    case = text_case()
    bench = Workbench(case, copy.deepcopy(case.model))

    def slow(accumulate, fast):
        step, adversary, harm = attacked(bench, moved=False, steps=3, lr=0.01, accumulate=accumulate, fast=fast)
        delta = prompt(GOAL, steps=0).found(step, harm).clone().requires_grad_()
        from expunge.seeds import generator

        seed = int(torch.randint(2**62, (1,), generator=step.again().rng))
        mover = torch.optim.Adam([delta], lr=0.01)
        for number in range(3):
            trial = step.again()
            trial.batch, trial.rng = step.batch.with_columns(prefix=delta), generator(seed, "prompt attack", number)
            g = torch.autograd.grad(-harm(trial), delta)[0]
            if not accumulate:
                mover.zero_grad()
            delta.grad = g.clone() if delta.grad is None else delta.grad + g
            if fast:
                delta.grad.sign_()
            mover.step()
        return delta.detach(), adversary.found(step, harm)

    results = {}
    for accumulate in (True, False):
        for fast in (True, False):
            wanted, results[accumulate, fast] = slow(accumulate, fast)
            assert torch.allclose(wanted, results[accumulate, fast], atol=1e-6)
    assert not torch.allclose(results[True, False], results[False, False])


def test_before_its_start_and_without_steps_it_rests():
    case = text_case()
    bench = Workbench(case, copy.deepcopy(case.model))
    step, *_, harm = attacked(bench, moved=False)
    assert prompt(GOAL, steps=0).attack(step, harm) is step
    step.progress = 0.49
    assert prompt(GOAL, steps=1, start=0.5).attack(step, harm) is step
    step.progress = 0.5
    hard = prompt(GOAL, steps=1, start=0.5).attack(step, harm)
    assert hard is not step and hard.batch["prefix"].shape == (4, 1, 64)
    draws = [torch.rand(3, generator=s.rng) for s in (step.again(), hard.again())]
    assert torch.equal(*draws)  # the terms draw what they would draw without an attack


def test_prompts_of_models_without_text_and_bad_settings_are_refused():
    case = class_case()
    bench = Workbench(case, copy.deepcopy(case.model))
    step, *_, harm = attacked(bench, moved=False)
    with pytest.raises(UnmetNeed, match="text encoder"):
        prompt(GOAL).attack(step, harm)
    with pytest.raises(BadSetting, match="tokens >= 1"):
        prompt(GOAL, tokens=0)
    with pytest.raises(BadSetting, match="'forget', found none"):
        prompt()
    with pytest.raises(BadSetting, match="retain"):
        prompt(Term(redirect("own"), on="retain"))
