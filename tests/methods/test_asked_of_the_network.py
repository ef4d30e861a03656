"""What each eraser asks of which network in one update, and the loss that it makes of the answers: the card's equation, read off
a run of the method itself. Parts are tested elsewhere; a part that a method wires wrongly fails here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from test_erasers import case_of, moved, workbench

from expunge import unlearn
from expunge.methods.edited.uce import attention_weights, directions
from expunge.parts.objectives import guided_error, redirect
from expunge.parts.scopes import component, salient
from expunge.tasks import Diffusion


@dataclass
class Asked:
    """One forward of the task: conditions in words or numbers, whether it is differentiated, what was answered."""

    told: list[Any]
    differentiated: bool
    noisy: torch.Tensor
    answer: torch.Tensor


@dataclass
class Trace:
    asked: list[Asked] = field(default_factory=list)
    sampled: list[list[Any]] = field(default_factory=list)
    """Conditions of every partial sampling."""
    still: int = 0
    """How often the first text position was held still."""

    def said(self, differentiated: bool) -> list[list[Any]]:
        return [a.told for a in self.asked if a.differentiated == differentiated]


def words(model: Any, condition: torch.Tensor) -> list[Any]:
    if model.kind == "class":
        return condition.tolist()
    return [model.conditions.text(model.conditions.content(row)) for row in condition]


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    module = importlib.import_module("expunge.parts.objectives.redirect")  # the package has a function of that name
    found, forward, partial, still = Trace(), Diffusion.forward, module.partial, module.first_token_still

    def watched(task: Diffusion, model: Any, batch: Any) -> Any:
        output = forward(task, model, batch)
        found.asked.append(Asked(
            words(model, task.condition(batch)), output.prediction.requires_grad, output.extra["noisy"].detach().clone(),
            output.prediction.detach().clone(),
        ))  # fmt: skip
        return output

    def sampled(model: Any, condition: torch.Tensor, *rest: Any) -> Any:
        found.sampled.append(words(model, condition))
        return partial(model, condition, *rest)

    def held(model: Any) -> Any:
        found.still += 1
        return still(model)

    monkeypatch.setattr(Diffusion, "forward", watched)
    monkeypatch.setattr(module, "partial", sampled)
    monkeypatch.setattr(module, "first_token_still", held)
    return found


def first_loss(outcome: Any, mark: str) -> float:
    losses = outcome.record["history"][0]["losses"]
    (value,) = [v for k, v in losses.items() if mark in k]
    return value


def squared(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean((1, 2, 3)).mean())


# -- SalUn -------------------------------------------------------------------------------------------------------------
ONE = {"steps": 1, "batch_size": 4, "lr": 1e-3, "floor": None}


def test_salun_s_mask_asks_guided_and_its_update_redirects_and_retains(trace: Trace):
    case = case_of("class")
    outcome = unlearn(case, "salun_generation", drop=0.0, alpha=2.0, density=0.4, clip=1.0, **ONE)
    mask, update = trace.asked[:2], trace.asked[2:]
    assert {tuple(a.told) for a in mask} == {(0,) * 4, (10,) * 4} and all(a.differentiated for a in mask)
    own, other, kept = update[:3]
    assert own.told == [0] * 4 and own.differentiated
    assert other.told == [1] * 4 and not other.differentiated and torch.equal(own.noisy, other.noisy)
    assert set(kept.told) <= {1, 2, 3} and kept.differentiated
    assert first_loss(outcome, "[forget]") == pytest.approx(squared(own.answer, other.answer), rel=1e-5)
    wanted = (salient(0.4, guided_error(3.0), batch_size=4, clip=1.0) & component("network")).select(workbench(case))
    changed = moved(case, outcome.model)
    assert all(not bool((flags & ~wanted[name]).any()) for name, flags in changed.items())
    assert sum(int(f.sum()) for f in changed.values()) > 0.9 * sum(
        int(m.sum()) for m in wanted.values() if m is not False
    )


def test_salun_s_retain_weight_and_dropped_conditions(trace: Trace):
    """With no forget term left to move anything, the weights move by alpha alone; conditions drop in all three calls."""
    case = case_of("class", each=40)
    unlearn(case, "salun_generation", drop=0.5, steps=1, batch_size=40, lr=1e-3, floor=None)
    own, other, kept = [a.told for a in trace.asked if len(a.told) == 40][-3:]
    for told, value in ((own, 0), (other, 1)):
        assert 5 < told.count(10) < 35 and told.count(10) + told.count(value) == 40
    assert 5 < kept.count(10) < 35
    assert [c == 10 for c in own] != [c == 10 for c in other]  # drawn independently
    still = unlearn(case_of("class"), "salun_generation", to="0", drop=0.0, alpha=0.0, **ONE)
    assert not moved(case_of("class"), still.model)  # to oneself, and nothing retained
    kept_only = unlearn(case_of("class"), "salun_generation", to="0", drop=0.0, alpha=1.0, **ONE)
    assert moved(case_of("class"), kept_only.model)


# -- ESD ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", [None, "a three"])
def test_esd_samples_under_the_concept_and_negates_it(trace: Trace, source: str | None):
    case = case_of("text")
    outcome = unlearn(case, "esd", concept="red", source=source, eta=1.7, sampling_steps=4, **{**ONE, "batch_size": 2})
    assert trace.sampled == [["red"] * 2]
    (own,) = [a for a in trace.asked if a.differentiated]
    said = {a.told[0]: a.answer for a in trace.asked if not a.differentiated}
    assert own.told == [source or "red"] * 2 and set(said) == {"red", ""} | ({source} if source else set())
    start = said[""] if source is None else said[source]
    assert first_loss(outcome, "[forget]") == pytest.approx(
        squared(own.answer, start - 1.7 * (said["red"] - said[""])), rel=1e-4
    )


# -- Concept Ablation --------------------------------------------------------------------------------------------------
def test_concept_ablation_answers_the_target_as_the_anchor(trace: Trace):
    case = case_of("text")
    outcome = unlearn(case, "concept_ablation", concept="red", anchor="plain", images=4, **ONE)
    own, other = trace.asked[-2:]
    assert own.told == ["a red three"] * 4 and own.differentiated and trace.still == 1
    assert other.told == ["a plain three"] * 4 and not other.differentiated and torch.equal(own.noisy, other.noisy)
    assert first_loss(outcome, "[forget]") == pytest.approx(squared(own.answer, other.answer), rel=1e-5)


def test_concept_ablation_of_a_class_and_by_noise(trace: Trace):
    unlearn(case_of("class"), "concept_ablation", concept="0", anchor="2", scope="all", images=4, **ONE)
    assert trace.said(True)[-1] == [0] * 4 and trace.said(False)[-1] == [2] * 4
    trace.asked.clear()
    unlearn(case_of("text"), "concept_ablation", concept="red", anchor="plain", noise_based=True, images=4, **ONE)
    assert trace.said(True) == [["a red three"] * 4] and not trace.said(False)


# -- UCE ---------------------------------------------------------------------------------------------------------------
def mapped(case: Any, outcome: Any, prompts: list[str], guides: list[str]) -> float:
    """Largest relative distance of what the edited weights make of prompts from what the old ones made of guides."""
    source, guide = directions(case.model, prompts, guides, "last")
    old, found = attention_weights(case.model), []
    for name, weight in attention_weights(outcome.model).items():
        wanted = guide @ old[name].double().T
        found.append(float((source @ weight.double().T - wanted).norm() / wanted.norm()))
    return max(found)


def test_uce_keeps_the_retain_rows_own_prompts_and_aligns_guides_with_prompts():
    case = case_of("text")
    kept = unlearn(case, "uce", concept=("red",), guide="plain", preserve_scale=1e6, floor=None)
    others = ["a plain seven", "an inverted two", "a striped one"]
    assert mapped(case, kept, others, others) < 1e-4
    assert kept.record["notes"]["preserved_prompts"] == 3
    own = unlearn(case, "uce", concept=("red",), guide="plain", own_prompts=True, preserve=(), lam=1e-8, floor=None)
    assert mapped(case, own, ["a red three"], ["a plain three"]) < 1e-3
    assert mapped(case, own, ["red"], ["plain"]) < 1e-3


def test_the_redirect_s_target_is_not_differentiated():
    case = case_of("class")
    bench = workbench(case)
    rows = case.split("forget")
    step = bench.step(case.task.prepare(rows.data.fetch(rows.ids), torch.Generator().manual_seed(0)), "forget")
    case.model.zero_grad()
    redirect("next")(step).mean().backward()
    table = case.model.unet.class_embedding.weight.grad
    assert float(table[0].abs().max()) > 0 and float(table[1].abs().max()) == 0


# -- DoCo, Scissorhands, SPM -------------------------------------------------------------------------------------------
def test_doco_tells_the_target_s_domain_from_the_anchor_s_with_the_first_position_still(trace: Trace, monkeypatch):
    module = importlib.import_module("expunge.parts.objectives.domain")
    held = []
    own = module.first_token_still
    monkeypatch.setattr(module, "first_token_still", lambda model: held.append(1) or own(model))
    case = case_of("text")
    unlearn(case, "doco", concept="red", anchor="plain", images=4, warm_up=0, **ONE)
    assert held == [1]  # the model's loss alone: the discriminator's answers carry no gradient to it
    target, anchor = ["a red three"] * 4, ["a plain three"] * 4
    assert (
        trace.said(True).count(target) == 1 and trace.said(True).count(anchor) == 1
    )  # the loss, and what it must not harm
    assert sorted(trace.said(False)) == [
        anchor,
        target,
    ]  # what the discriminator learns from: the original's, the model's


@pytest.mark.parametrize("sparsity", [0.9, 0.97])
def test_scissorhands_draws_the_most_sensitive_share_anew(sparsity: float):
    """The share of the whole network that may be drawn anew is 1 - sparsity, cut to cross-attention."""
    case = case_of("text")
    outcome = unlearn(
        case, "scissorhands", to="red -> plain", sparsity=sparsity, steps=1, batch_size=4, lr=1e-12, floor=None
    )
    flags, before, after = moved(case, outcome.model), case.model.state_dict(), outcome.model.state_dict()
    # a step of 1e-12 moves no float32 weight of ordinary size by more than its last bit
    drawn = {n: f & ((after[n] - before[n]).abs() > 1e-6) for n, f in flags.items()}
    assert all("attn2" in name for name, f in drawn.items() if bool(f.any()))
    network = sum(p.numel() for p in case.model.unet.parameters())
    assert 0 < sum(int(f.sum()) for f in drawn.values()) <= (1 - sparsity) * network


def test_spm_stays_near_the_original_around_random_embeddings():
    """Same draws, so only the anchoring differs: with much of it the adapter says less that is not the original's there."""
    case = case_of("text")
    settings = {
        "concept": ("red",),
        "steps": 12,
        "batch_size": 2,
        "lr": 1e-3,
        "sampling_steps": 3,
        "warmup": 0.0,
        "floor": None,
    }

    def around(anchoring: float) -> float:
        outcome = unlearn(case, "spm", anchoring=anchoring, **settings)
        return next(v for k, v in outcome.record["history"][-1]["losses"].items() if "around" in k)

    assert around(1e6) < 0.7 * around(1e-6)
