"""AdvUnlearn against ESD and its equations, and against the faults of its released code."""

from __future__ import annotations

import copy

import pytest
import torch

from diffusion_nets import pipeline
from expunge import TensorData, unlearn
from expunge.engine.workbench import Workbench
from expunge.errors import BadData, UnmetNeed
from expunge.methods import find
from expunge.methods.tuned.common import counted
from expunge.parts import Optimizer, Plan, Term, fit, negated, redirect
from expunge.parts.objectives.redirect import Partial
from expunge.parts.scopes import component
from expunge.tasks.denoiser import Denoiser
from expunge.tasks.sampling import Sampling
from tiny_pipelines import class_case, text_case
from toys import toy

SMALL = {
    "steps": 3,
    "batch_size": 2,
    "retain_batch_size": 3,
    "sampling_steps": 2,
    "lr": 1e-3,
    "attack_steps": 2,
    "warm_up": 0,
}


def states(case, **settings):
    return unlearn(case, "advunlearn", seed=0, floor=None, **SMALL | settings).model.state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_without_an_attack_it_is_esd_in_the_text_encoder_with_the_retain_term():
    case = text_case()
    sampling = Sampling(2, 3.0)
    asked, kept = Partial("original", sampling, "red"), Partial("original", sampling)
    plan = Plan(
        Term(negated(1.0, "red", None, asked), on="forget"),
        Term(redirect("own", "original", kept), on="retain", weight=0.3, batch_size=3),
        scope=component("text_encoder"), optimizer=Optimizer("adam", lr=1e-3), mode="eval", **counted(case, 3, 2),
    )  # fmt: skip
    by_hand = unlearn(case, plan, seed=0, floor=None).model.state_dict()
    none = states(case, concept="red", retain_w=0.3, attack_steps=0)
    assert equal(none, by_hand)
    assert equal(states(case, concept="red", retain_w=0.3, warm_up=3), by_hand)  # all of it is warm-up
    hard = states(case, concept="red", retain_w=0.3, warm_up=2)
    assert not equal(hard, by_hand) and not equal(states(case, concept="red", retain_w=0.3), hard)


def test_esds_target_is_computed_by_hand_under_the_adversarial_words():
    case = text_case()
    bench = Workbench(case, copy.deepcopy(case.model))
    plan = find("advunlearn").configure(**SMALL | {"concept": "red"}).action(case)
    rows = bench.splits["forget"]
    batch = bench.task.prepare(bench.fill(rows.data.fetch(rows.ids[:2])), torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    words = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([500, 500])
    step = bench.step(batch.with_columns(prefix=words), "forget")
    objective = plan.terms[0].objective
    object.__setattr__(objective, "latents", lambda s: s.batch.with_columns(noisy=x, timestep=t))
    model, red = case.model, case.model.conditions.of(["red", "red"])
    with torch.no_grad():
        none = model(x, t, model.encode(model.conditions.of(["", ""])))
        target = none - (model(x, t, model.encode(red)) - none)
        wanted = (model(x, t, model.encode(red, words)) - target).square().flatten(1).mean(1)
        assert torch.allclose(objective(step), wanted, rtol=1e-4)


def test_only_the_text_encoder_moves_and_never_its_embeddings():
    case = text_case()
    before, after = case.model.state_dict(), states(case)
    moved = {k for k in after if not torch.equal(before[k], after[k])}
    assert moved and all(k.startswith("text_encoder.") and "embeddings" not in k for k in moved)
    assert any("final_layer_norm" in k for k in moved)
    first = states(case, first_layers=1)
    moved = {k for k in first if not torch.equal(before[k], first[k])}
    assert moved and all("layers.0." in k for k in moved)
    network = states(case, scope="x")
    assert all("attn2" in k for k in network if not torch.equal(before[k], network[k]))


def test_prompts_alone_are_read():
    case = text_case()
    columns = {n: case.data.column(n) for n in case.data.names}
    other = case.with_(data=TensorData(**columns | {"latents": -columns["latents"]}))
    assert equal(states(case), states(other))


def test_retain_prompts_that_hold_the_concept_are_refused_by_tokens():
    with pytest.raises(BadData, match="'a plain zero'"):
        find("advunlearn").configure(concept="plain").action(text_case())
    find("advunlearn").configure(concept="red").action(text_case())  # "red" is no part of another word's token
    with pytest.raises(UnmetNeed, match="class-conditional"):
        find("advunlearn").configure().action(class_case())


def test_both_ways_to_retain_lower_the_retain_loss():
    case = text_case()

    def left(**settings):
        after = copy.deepcopy(case.model)
        after.load_state_dict(states(case, steps=5, lr=3e-3, attack_steps=0, **settings))
        rows, total = case.split("retain"), 0.0
        with torch.no_grad():
            ids = rows.data.fetch(rows.ids)["input_ids"]
            x = torch.randn(len(ids), 3, 8, 8, generator=torch.Generator().manual_seed(0))
            t = torch.tensor(400)
            total = (after(x, t, after.encode(ids)) - case.model(x, t, case.model.encode(ids))).square().mean()
        return float(total)

    without = left(retain_w=0.0)
    assert left(retain="reg") < without and left(retain="iter") < without
    plan = find("advunlearn").configure(retain="iter").action(case)
    assert plan.terms[0].optimizer is None and plan.terms[1].optimizer is not None


def test_the_attack_is_the_cards_and_what_it_costs_the_weights_is_nothing():
    plan = find("advunlearn").configure(concept="red", steps=1000, batch_size=1).action(text_case())
    attack = plan.adversary
    assert (attack.steps, attack.lr, attack.tokens, attack.accumulate, attack.fast) == (30, 1e-3, 1, True, False)
    assert attack.start == pytest.approx(0.2) and "prompt(1 word, 30" in plan.formula
    assert str(attack.goal[0].objective) == "D(original(red)‖model(red))"


def test_the_encoder_goes_into_another_pipeline_from_its_folder(tmp_path):
    """The plug-in claim: a second network's pipeline loads with the unlearned encoder, hears its embedding of the concept, and keeps all
    its own weights."""
    import transformers
    from diffusers import StableDiffusionPipeline

    case = text_case()
    outcome = unlearn(case, "advunlearn", floor=None, run=tmp_path / "run", concept="red", **SMALL)
    second = pipeline("text", seed=7)
    second.save_pretrained(tmp_path / "second")
    encoder = transformers.CLIPTextModel.from_pretrained(
        tmp_path / "run" / "model" / "text_encoder", local_files_only=True
    )
    other = StableDiffusionPipeline.from_pretrained(tmp_path / "second", text_encoder=encoder, local_files_only=True)
    other.set_progress_bar_config(disable=True)
    assert all(torch.equal(v, second.unet.state_dict()[k]) for k, v in other.unet.state_dict().items())

    def embedded(pipe, prompt):
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0].detach()

    ids = case.model.conditions.of(["a red three"])
    ours = outcome.model.encode(ids).detach()
    assert torch.equal(embedded(other, "a red three"), ours)
    assert not torch.allclose(ours, case.model.encode(ids), atol=1e-3)  # and it is the changed one
    assert not torch.allclose(ours, embedded(second, "a red three"), atol=1e-3)

    def draw(pipe):
        rng = torch.Generator().manual_seed(3)
        return pipe(["a red three"], num_inference_steps=3, guidance_scale=2.0, generator=rng, output_type="pt").images

    drawn = draw(other)
    assert drawn.shape == (1, 3, 8, 8) and bool(drawn.isfinite().all()) and not torch.equal(drawn, draw(second))
    back = Denoiser(other)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor(400)
    with torch.no_grad():
        says = back(x, t, back.encode(ids))
        assert torch.allclose(says, second.unet(x, t, encoder_hidden_states=ours).sample, atol=1e-4)


def test_the_encoder_erases_in_a_network_it_was_not_trained_with():
    """A second network that shares the trained toy's encoder (tuned on the same captions, the encoder still): what red changes in its
    prediction shrinks there as it does at home, and what other words change shrinks less."""
    t = toy("captions")
    settings = {
        "steps": 8, "batch_size": 8, "retain_batch_size": 8, "sampling_steps": 4, "lr": 5e-3, "eta": 3.0, "retain_w": 0.3,
        "attack_steps": 1, "attack_lr": 0.05, "warm_up": 6,
    }  # fmt: skip
    found = unlearn(t.case, "advunlearn", floor=None, concept="red", **settings).model
    rows = t.case.split("train")
    plan = Plan(
        Term(fit(), on="train"),
        scope=component("network"),
        optimizer=Optimizer("adam", lr=2e-3),
        epochs=2,
        batch_size=32,
    )
    second = unlearn(t.case, plan, seed=3, floor=None).model
    assert equal(second.text_encoder.state_dict(), t.case.model.text_encoder.state_dict())
    moved = copy.deepcopy(second)
    moved.text_encoder.load_state_dict(found.text_encoder.state_dict())
    batch = rows.data.fetch(rows.ids[:64])
    x = t.case.model.noised(
        batch["latents"], torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((64,), 500)
    )

    def away(model, words):
        """How far prompts of a style are from the empty one, as the network's output has it."""
        told, none = (model.encode(model.conditions.of([p])) for p in (f"a {words} three", ""))
        with torch.no_grad():
            says = [model(x, torch.tensor(500), c.expand(64, -1, -1)) for c in (told, none)]
        return float((says[0] - says[1]).square().mean())

    left = {name: {w: away(new, w) / away(old, w) for w in ("red", "inverted")} for name, new, old in
            (("home", found, t.case.model), ("second", moved, second))}  # fmt: skip
    assert left["second"]["red"] < 0.6 and left["home"]["red"] < 0.6, left
    assert left["second"]["inverted"] > left["second"]["red"] + 0.3, left
