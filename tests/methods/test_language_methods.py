"""The methods of language unlearning against hand-made steps, their papers' identities, and what the toy shows.

A step by SGD without clipping, schedule or decay moves the weights by lr times the gradient of the card's formula, computed
here with plain transformers and torch.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge import Case, requests, unlearn
from expunge.cases.text import TextData
from expunge.errors import BadSetting, UnmetNeed
from expunge.methods import find
from expunge.methods.tuned.common import finetuning
from expunge.methods.tuned.rmu import steered_layer
from expunge.parts import Plan, Term, fit
from tiny_language import language_case, llama, rows

REFUSALS = [[7, 8, 2], [9, 2]]
ONE_STEP = {"optimizer": "sgd", "lr": 1.0, "epochs": 1, "batch_size": 1000, "schedule": "constant", "warmup": 0.0,
            "weight_decay": 0.0, "clip": None}  # fmt: skip


def case(n: int = 9, forget: int = 4, **extra: Any) -> Case:
    table = rows(n)
    table = TextData(table.tokens, table.starts, pad=0, refusals=REFUSALS, **extra)
    torch.manual_seed(0)
    return Case(llama(layers=2).double(), table, requests.samples(range(forget)), task="language")


def moved(c: Case, name: str, **settings: Any) -> dict[str, Tensor]:
    """The gradient that one step of a method followed."""
    after = unlearn(c, name, floor=None, **{**ONE_STEP, **settings}).model
    named = dict(after.named_parameters())
    return {n: p.detach() - named[n].detach() for n, p in c.model.named_parameters()}


def answers(c: Case, split: str) -> list[tuple[list[int], int]]:
    return [(c.data.tokens[i], c.data.starts[i]) for i in c.split(split).ids.tolist()]


def token_logits(model: nn.Module, row: list[int], start: int) -> tuple[Tensor, Tensor]:
    """(n, V) logits that predict the answer, (n,) answer: one row, no padding, no batch."""
    z = model(input_ids=torch.tensor([row])).logits[0]
    return z[start - 1 : len(row) - 1], torch.tensor(row[start:])


def over_tokens(model: nn.Module, pairs: list[tuple[list[int], int]], one: Any) -> Tensor:
    return torch.cat([one(*token_logits(model, r, s)) for r, s in pairs]).mean()


def nll(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def check(c: Case, got: dict[str, Tensor], value: Any) -> None:
    model = copy.deepcopy(c.model)
    names, weights = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(value(model), weights), strict=True))
    for name, g in got.items():
        assert torch.allclose(g, expected[name], atol=1e-9), name


def sums(model: nn.Module, pairs: list[tuple[list[int], int]]) -> Tensor:
    return torch.stack([nll(*token_logits(model, r, s)).sum() for r, s in pairs])


def p(z: Tensor, y: Tensor) -> Tensor:
    return (-nll(z, y)).exp()


def others(z: Tensor, y: Tensor) -> Tensor:
    return z.scatter(1, y[:, None], -torch.inf)


FORMULAS = {
    "grad_diff": ({"gamma": 0.5, "alpha": 2.0}, lambda m, f, r, _: -0.5 * over_tokens(m, f, nll) + 2 * over_tokens(m, r, nll)),
    "wga": ({"beta": 0.5}, lambda m, f, r, _: over_tokens(m, f, lambda z, y: -(p(z, y).detach() ** 0.5) * nll(z, y))
            + over_tokens(m, r, nll)),
    "satimp": ({}, lambda m, f, r, _: over_tokens(m, f, lambda z, y: -(p(z, y) ** 5 * (1 - p(z, y))).detach() * nll(z, y))
               + 0.1 * over_tokens(m, r, nll)),
    "simnpo": ({"beta": 2.5, "delta": 0.3}, lambda m, f, r, _: -0.125 * (2 / 2.5) * F.logsigmoid(
        2.5 * (torch.stack([nll(*token_logits(m, *x)).mean() for x in f]) - 0.3)).mean() + over_tokens(m, r, nll)),
    "npo": ({"beta": 0.3}, lambda m, f, r, o: -(2 / 0.3) * F.logsigmoid(0.3 * (sums(m, f) - sums(o, f).detach())).mean()
            + over_tokens(m, r, nll)),
    "ceu": ({"skip": 0}, lambda m, f, r, _: over_tokens(
        m, f, lambda z, y: torch.logsumexp(z, -1) - torch.logsumexp(others(z, y), -1))),
    "undial": ({"beta": 3.0}, lambda m, f, r, o: torch.cat([
        F.cross_entropy(token_logits(m, *x)[0], (token_logits(o, *x)[0].detach()
                        - 3 * F.one_hot(token_logits(o, *x)[1], 40)).softmax(-1), reduction="none") for x in f]).mean()),
    "kl_min": ({}, lambda m, f, r, o: -over_tokens(m, f, nll) + torch.stack([
        F.kl_div(token_logits(m, *x)[0].log_softmax(-1), token_logits(o, *x)[0].detach().log_softmax(-1), log_target=True,
                 reduction="none").sum(-1).mean() for x in r]).mean()),
    "pdu": ({"start": 3.0}, lambda m, f, r, _: over_tokens(m, f, lambda z, y: (z.amax(-1) - z.mean(-1)) ** 2)
            + 3 * over_tokens(m, r, nll)),
    "grad_ascent": ({}, lambda m, f, r, _: -over_tokens(m, f, nll)),
}  # fmt: skip
"""method -> (settings, the card's formula by a loop over single rows; o is the original)."""


@pytest.mark.parametrize("name", FORMULAS)
def test_one_step_follows_the_gradient_of_the_formula(name):
    settings, formula = FORMULAS[name]
    c = case()
    forget, retain = answers(c, "forget"), answers(c, "retain")
    check(c, moved(c, name, **settings), lambda m: formula(m, forget, retain, c.model))


def refused(c: Case) -> list[tuple[list[int], int]]:
    """The forget prompts with the one refusal there is."""
    return [(r[:s] + REFUSALS[0], s) for r, s in answers(c, "forget")]


def one_refusal() -> Case:
    c = case()
    c.data.refusals = REFUSALS[:1]
    return c


def test_dpo_idk_flat_and_llmu_read_refusals_to_the_same_questions():
    c = one_refusal()
    f, r, e, o = answers(c, "forget"), answers(c, "retain"), refused(c), c.model
    check(c, moved(c, "dpo", beta=0.3), lambda m: -(2 / 0.3) * F.logsigmoid(
        0.3 * (sums(o, e).detach() - sums(m, e) - sums(o, f).detach() + sums(m, f))).mean() + over_tokens(m, r, nll))  # fmt: skip
    check(c, moved(c, "idk", gamma=0.5), lambda m: 0.5 * over_tokens(m, e, nll) + over_tokens(m, r, nll))
    mean_p = lambda m, rows: torch.stack([p(*token_logits(m, *x)).mean() for x in rows]).mean()  # noqa: E731
    check(c, moved(c, "flat", divergence="kl"), lambda m: (mean_p(m, f) - 1).exp() - mean_p(m, e))
    check(c, moved(c, "llmu", normal=0.0), lambda m: -0.5 * over_tokens(m, f, nll) + over_tokens(m, e, nll))


def test_refusals_are_needed_only_where_they_are_read():
    """dpo(answers="other") reads other rows' answers: data without refusals will do."""
    table = rows(9)
    torch.manual_seed(0)
    bare = Case(llama(layers=2).double(), table, requests.samples(range(4)), task="language")
    with pytest.raises(UnmetNeed, match="decline"):
        unlearn(bare, "dpo")
    with pytest.raises(UnmetNeed, match="other answers to each question"):
        unlearn(bare, "dpo", answers="alternates")
    assert unlearn(bare, "dpo", answers="other", floor=None, **ONE_STEP).record["updates"] == 1
    assert find("dpo").configure(answers="other").unmet(bare) == []


def test_altpo_prefers_the_rows_own_alternatives():
    alternates = [[[10 + i, 2]] for i in range(9)]
    c = case(alternates=alternates)
    f, r = answers(c, "forget"), answers(c, "retain")
    e = [(row[:s] + alternates[i][0], s) for i, (row, s) in enumerate(f)]
    check(c, moved(c, "altpo"), lambda m: -20 * F.logsigmoid(
        0.1 * (sums(c.model, e).detach() - sums(m, e) - sums(c.model, f).detach() + sums(m, f))).mean()
        + over_tokens(m, r, nll))  # fmt: skip
    with pytest.raises(UnmetNeed, match="alternates"):
        unlearn(case(), "altpo")


def test_rmu_steers_answers_and_holds_the_rest():
    c = case()
    layer = steered_layer(c)
    after = unlearn(c, "rmu", floor=None, lr=0.02, epochs=40, batch_size=4, strength=6.0, alpha=0.1, gamma=1.0).model

    def activations(model: nn.Module, split: str) -> Tensor:
        seen = []
        hook = model.get_submodule(layer).register_forward_hook(lambda *a: seen.append(a[2]))
        for row, start in answers(c, split):
            model(input_ids=torch.tensor([row]))
            seen[-1] = seen[-1][0, start:]
        hook.remove()
        return torch.cat(seen).detach()

    def agreement(h: Tensor) -> float:
        return float(F.cosine_similarity(h, h.mean(0, keepdim=True)).mean())

    before, forgot = activations(c.model, "forget"), activations(after, "forget")
    assert agreement(forgot) > 0.95 > agreement(before)  # all in one direction
    assert (forgot.mean(0) > 0).float().mean() > 0.9  # which is positive
    shift = (activations(after, "retain") - activations(c.model, "retain")).norm()
    assert shift < (forgot - before).norm()


def test_rmus_layer_is_seven_of_thirty_two_and_its_weights_can_be_named():
    assert steered_layer(language_case(llama(layers=3))) == "model.layers.1"
    assert steered_layer(language_case(llama(layers=32, width=4))) == "model.layers.7"
    c = case()
    got = moved(c, "rmu", weights=("model.layers.0.mlp.down_proj.weight",))
    assert [n for n, g in got.items() if g.abs().sum() > 0] == ["model.layers.0.mlp.down_proj.weight"]


def test_a_padded_neighbour_changes_nothing():
    """Means are over an example's own answer: a batch's longest row, its padding and the prompts stay out of it."""
    c = case(n=4, forget=1)
    alone = moved(c, "undial", average="examples")
    longer = TextData([*c.data.tokens, [*range(3, 30), 2]], [*c.data.starts, 10], pad=0, refusals=REFUSALS)
    both = Case(c.model, longer, requests.samples([0, 4]), task="language")
    other = Case(c.model, longer, requests.samples([4]), task="language")
    pair, single = moved(both, "undial", average="examples"), moved(other, "undial", average="examples")
    for name in alone:
        assert torch.allclose(pair[name], (alone[name] + single[name]) / 2, atol=1e-9), name


# -- the loop around them -----------------------------------------------------------------------------------------------
def test_finetuning_adds_the_loops_settings_with_the_methods_own_defaults():
    wga = find("wga")
    assert wga.configure().values["epochs"] == 5 and wga.configure().values["lr"] == 1e-5
    plan = wga.configure(lr=2e-4, epochs=8, warmup=2.0, optimizer="sgd").action(case())
    assert plan.optimizer.warmup == 0.25 and plan.optimizer.schedule == "linear" and plan.optimizer.name == "sgd"
    assert plan.epoch_of == "forget" and plan.rhythm == "together"
    with pytest.raises(BadSetting, match="lr"):
        wga.configure(lr=-1.0)
    with pytest.raises(BadSetting, match="batch_size"):
        wga.configure(batchsize=3)
    with pytest.raises(BadSetting, match="weight_deacy"):
        finetuning(weight_deacy=0.1)
    assert isinstance(finetuning(epochs=3)(lambda: Plan(Term(fit())))(), Plan)


def test_needs_are_named_before_any_compute():
    with pytest.raises(UnmetNeed, match="refusals"):
        unlearn(language_case(), "dpo")
    with pytest.raises(BadSetting, match="as_coded"):
        unlearn(case(), "flat", divergence="neyman")


def test_pdu_moves_its_multiplier_only_after_the_warm_up():
    c = case()
    record = unlearn(c, "pdu", floor=None, epochs=4, after=2, start=10.0, rate=1.0, bound=0.1, batch_size=4).record
    values = [entry["multipliers"] for entry in record["history"]]
    first = [next(iter(v.values())) for v in values]
    assert (
        first[0] == first[1] == 10.0 and first[2] > 10.0 and first[3] > first[2]
    )  # an untrained model is above the bound
