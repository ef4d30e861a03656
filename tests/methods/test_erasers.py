"""UCE, ESD, SalUn for generation, Concept Ablation: closed forms, masks and the faults of official codes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from diffusion_nets import denoiser, shared
from expunge import Case, Sampling, pictures, requests, unlearn
from expunge.errors import BadSetting, UnmetNeed
from expunge.methods.edited.uce import attention_weights, directions, solved, text_states
from expunge.methods.tuned.esd import ESD_SCOPES
from expunge.parts.objectives import drawn, fit, guided_error, redirect
from expunge.parts.scopes import component, salient, top_share
from expunge.seeds import generator

PROMPTS = ["a red three", "a plain seven", "an inverted two", "a striped one"]


def case_of(kind: str, each: int = 4) -> Case:
    model, rows = denoiser(kind), 4 * each
    images = torch.rand((rows, model.shape[0], 8, 8), generator=generator(0, "x")) * 2 - 1
    group = torch.arange(4).repeat_interleave(each)
    if kind == "class":
        return Case(model, pictures(model, images, labels=group), requests.label(0), task="diffusion")
    data = pictures(model, images, prompts=[p for p in PROMPTS for _ in range(each)], style=group)
    return Case(model, data, requests.where("style", "==", 0), task="diffusion")


def moved(case: Case, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Which values differ from the original's, by name."""
    before = case.model.state_dict()
    return {k: v != before[k] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


# -- UCE ---------------------------------------------------------------------------------------------------------------
def test_uce_is_the_minimum_of_its_quadratic_objective():
    rng = generator(0, "uce")
    W = torch.randn((6, 5), generator=rng, dtype=torch.float64)
    c, g, p = (torch.randn((n, 5), generator=rng, dtype=torch.float64) for n in (3, 3, 4))
    new = solved(W, (c, g), p, lam=0.5, erase_scale=2.0, keep_scale=0.7, erase="replace").requires_grad_(True)
    energy = (
        2.0 * (c @ new.T - g @ W.T).square().sum()
        + 0.7 * (p @ new.T - p @ W.T).square().sum()
        + 0.5 * (new - W).square().sum()
    )
    assert float(torch.autograd.grad(energy, new)[0].abs().max()) < 1e-9
    assert torch.allclose(solved(W, (c, c), p, 0.5, 1.0, 1.0, "replace"), W)  # erase to itself: nothing moves


def test_uce_project_takes_the_guide_s_part_along_the_concept_away():
    rng = generator(1, "uce")
    W = torch.randn((6, 5), generator=rng, dtype=torch.float64)
    c, g = (torch.randn((1, 5), generator=rng, dtype=torch.float64) for _ in range(2))
    new = solved(W, (c, g), torch.zeros(0, 5, dtype=torch.float64), 1e-12, 1.0, 1.0, "project")
    along = torch.nn.functional.normalize(c @ W.T, dim=1)
    assert abs(float((c @ new.T * along).sum())) < 1e-6


def test_uce_reads_the_last_content_token():
    model = shared("text")
    states, last = text_states(model, ["red", "a red three", ""])
    assert last.tolist() == [1, 3, 0]  # 0: the start token
    ids = model.conditions.of(["a red three"])
    torch.testing.assert_close(states[1, 3], model.encode(ids)[0, 3].double().detach())
    source, guide = directions(model, ["a red three"], ["plain"], "tail")
    assert source.shape == guide.shape == (16 - 3, model.text_encoder.config.hidden_size)
    torch.testing.assert_close(source[0], states[1, 3])


def test_uce_moves_cross_attention_alone_and_maps_the_concept_to_the_guide():
    case = case_of("text")
    outcome = unlearn(case, "uce", concept=("red",), guide="plain", lam=1e-6, preserve=(), floor=None)
    assert set(moved(case, outcome.model)) == set(attention_weights(case.model))
    source, guide = directions(case.model, ["red"], ["plain"], "last")
    for name, weight in attention_weights(outcome.model).items():
        old = attention_weights(case.model)[name]
        wanted = guide @ old.double().T
        assert float((source @ weight.double().T - wanted).norm() / wanted.norm()) < 1e-3


def test_uce_is_refused_without_cross_attention_and_for_words_without_tokens():
    with pytest.raises(UnmetNeed, match="text-conditional model with cross-attention for uce"):
        unlearn(case_of("class"), "uce", concept=("0",))
    with pytest.raises(BadSetting, match="tokenizer can write"):
        unlearn(case_of("text"), "uce", concept=("赤",))


# -- SalUn -------------------------------------------------------------------------------------------------------------
SALUN = {"steps": 3, "batch_size": 4, "lr": 1e-3}


def test_salun_moves_exactly_its_share_and_the_rest_stays_bit_for_bit():
    case = case_of("class")
    outcome = unlearn(case, "salun_generation", density=0.25, floor=None, **SALUN)
    network = sum(p.numel() for p in case.model.unet.parameters())
    share = sum(int(m.sum()) for m in moved(case, outcome.model).values())
    assert share <= int(0.25 * network) and share > 0.2 * network  # a weight whose gradient is zero stays


def workbench(case: Case):
    from expunge.engine.workbench import Workbench
    from expunge.parts.references import References

    references = References(case.task, make={"original": lambda: case.model}, steady=True)
    return Workbench(case, case.model, 0, torch.device("cpu"), references=references)


def test_salun_s_mask_keeps_the_largest_summed_gradients_of_the_guided_error():
    """Three faults of published ports: smallest kept, absolute values summed, the null prompt equal to the concept's."""
    from expunge.parts.step import Step  # noqa: F401

    case = case_of("class")
    bench = workbench(case)
    scope = salient(0.3, guided_error(3.0), batch_size=2, clip=1.0)
    mask = scope.select(bench)
    names = [n for n, p in case.model.named_parameters() if p.requires_grad]
    total = {n: torch.zeros_like(case.model.get_parameter(n)) for n in names}
    rows = case.split("forget")
    for number, ids in enumerate(rows.ids.split(2)):
        batch = case.task.prepare(rows.data.fetch(ids), generator(0, "prepare", "forget", number))
        t = case.task.timestep(case.model, batch)
        noisy = case.model.noised(batch["latents"], batch["noise"], t)
        told = case.model(noisy, t, batch["labels"])
        free = case.model(noisy, t, torch.full_like(batch["labels"], 10))
        loss = (3.0 * told - 2.0 * free - batch["noise"]).square().mean((1, 2, 3)).mean()
        found = torch.autograd.grad(loss, [case.model.get_parameter(n) for n in names], allow_unused=True)
        size = torch.sqrt(sum(g.square().sum() for g in found if g is not None))
        for name, g in zip(names, found, strict=True):
            if g is not None:
                total[name] += g * min(1.0, 1.0 / float(size))
    flat = torch.cat([v.abs().reshape(-1) for v in total.values()])
    kept = torch.cat([mask[n].reshape(-1) for n in names])
    assert int(kept.sum()) == int(0.3 * len(flat))
    agree = float((flat[kept].min() >= flat[~kept].max() * (1 - 1e-3)).float())
    assert agree == 1.0


def test_top_share_is_the_stable_sort_s():
    rng = generator(0, "scores")
    scores = {
        "a": torch.rand((40, 7), generator=rng).round(decimals=1),
        "b": -torch.rand(50, generator=rng),
        "c": torch.zeros(9),
    }
    for density in (0.0, 0.1, 0.5, 0.83, 1.0):
        flat = torch.cat([s.reshape(-1) for s in scores.values()])
        keep = torch.zeros(len(flat), dtype=torch.bool)
        keep[torch.sort(flat, descending=True, stable=True).indices[: int(density * len(flat))]] = True
        found = torch.cat([m.reshape(-1) for m in top_share(scores, density).values()])
        assert torch.equal(found, keep)


def test_density_one_equals_no_mask_and_the_redirect_has_no_gradient_on_its_target():
    from expunge import Optimizer, Plan, Term

    case = case_of("class")
    whole = unlearn(case, "salun_generation", density=1.0, alpha=0.0, drop=0.0, clip=None, floor=None, **SALUN)
    plain = unlearn(
        case,
        Plan(Term(redirect("next")), optimizer=Optimizer("adam", lr=1e-3), epochs=3, batch_size=4, epoch_of="forget"),
        floor=None,
    )
    assert all(torch.equal(v, plain.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


# -- ESD ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scope", ["x", "x_strict", "u", "all"])
def test_esd_moves_its_scope_alone(scope):
    case = case_of("text")
    outcome = unlearn(case, "esd", concept="red", scope=scope, steps=2, lr=1e-3, sampling_steps=3, floor=None)
    touched = set(moved(case, outcome.model))
    inside = component(ESD_SCOPES[scope]).select(workbench(case))
    assert touched and all(inside[name] is True for name in touched)
    assert any("attn2" in name for name in touched) == (scope != "u")


def test_esd_needs_words_alone_and_its_latents_have_two_sources():
    case = case_of("text")
    student, original = (
        unlearn(case, "esd", concept="red", latents=who, steps=3, lr=1e-2, sampling_steps=4, floor=None)
        for who in ("student", "original")
    )
    a, b = student.model.state_dict(), original.model.state_dict()
    assert any(not torch.equal(a[k], b[k]) for k in a)
    first = [o.record["history"][0]["losses"] for o in (student, original)]
    assert first[0] == first[1]  # before the first update the student is the original


# -- Concept Ablation --------------------------------------------------------------------------------------------------
def test_concept_ablation_learns_on_the_anchor_s_images_under_the_target_s_prompt():
    case = case_of("text")
    bench = workbench(case)
    objective = drawn("red -> plain", redirect("own", source="plain -> red"), 6, Sampling(3, 2.0))
    memory = objective.prepare(bench, "forget")
    (latents, conditions), _ = memory
    assert len(latents) == 6
    assert torch.equal(conditions, case.model.conditions.of(["a plain three"] * 6))
    rows = case.split("forget")
    step = bench.step(case.task.prepare(rows.data.fetch(rows.ids), generator(0, "d")), "forget")
    step.scratch["memory"] = memory
    start = step.rng.get_state()
    value = objective(step)
    rng = torch.Generator().set_state(start)
    chosen = torch.randint(0, 6, (len(step.batch),), generator=rng)
    t = case.task.timestep(case.model, step.batch)
    noisy = case.model.noised(latents[chosen], step.batch["noise"], t)
    with torch.no_grad():
        anchor = case.model(noisy, t, case.model.encode(conditions[chosen]))
        target = case.model(noisy, t, case.model.encode(case.model.conditions.of(["a red three"] * len(chosen))))
    torch.testing.assert_close(value.detach(), (anchor - target).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-7)


def test_the_first_text_position_carries_no_gradient():
    from expunge.parts.objectives.redirect import first_token_still

    model = shared("text")
    encoded = model.encode(model.conditions.of(["a red three"])).detach().requires_grad_(True)
    noisy, t = torch.randn((1, 3, 8, 8), generator=generator(0, "n")), torch.tensor([500])
    free = torch.autograd.grad(model(noisy, t, encoded).square().sum(), encoded)[0]
    with first_token_still(model):
        still = torch.autograd.grad(model(noisy, t, encoded).square().sum(), encoded)[0]
    assert float(free[:, 0].abs().max()) > 0 and float(still[:, 0].abs().max()) == 0
    torch.testing.assert_close(free[:, 1:], still[:, 1:])


def test_concept_ablation_moves_keys_and_values():
    case = case_of("text")
    outcome = unlearn(
        case, "concept_ablation", concept="red", anchor="plain", images=4, steps=2, lr=1e-3, retain=1.0, floor=None
    )
    assert set(moved(case, outcome.model)) == set(attention_weights(case.model))
    assert str(fit()) in outcome.formula
