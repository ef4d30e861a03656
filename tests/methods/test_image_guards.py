"""Guards of diffusion models against slow loops, an ordinary SVD and diffusers' own pipeline; Forget-Me-Not and SPM."""

from __future__ import annotations

import copy
import functools
import importlib
import math

import pytest
import torch

from diffusion_nets import denoiser, shared
from expunge import unlearn
from expunge.engine.workbench import Workbench
from expunge.errors import BadModel, BadSetting, UnmetNeed
from expunge.files import digest_weights
from expunge.methods import find
from expunge.parts.attention_maps import attention_maps
from expunge.parts.concept_adapters import ConceptAdapters, adapted_layers
from expunge.parts.guarded import load_guard
from expunge.parts.guarded_diffusion import PRESETS, NegativePrompt, SafeGuidance, Safety, Seen, SoftEndTokens, softened
from expunge.parts.objectives.attention_norm import attention_norm
from expunge.parts.objectives.random_conditions import drawn_embeddings, keep_around
from expunge.tasks.sampling import Sampling, denoised, sample
from tiny_pipelines import class_case, text_case

RED, PLAIN = "a red three", "a plain three"


def drawn(model, prompts, steps=4, guidance=3.0, **settings):
    return sample(model, model.conditions.of(prompts), Sampling(steps, guidance, **settings), seeds=5).images


# -- a guard has its base's interface ----------------------------------------------------------------------------------
def guards():
    model = shared("text")
    return {
        "negative_prompt": NegativePrompt(model, "red"), "safe_guidance": SafeGuidance(model, "red", PRESETS["max"]),
        "soft_end_tokens": SoftEndTokens(model, "red | crimson", 0.5, 0.25, iterations=2),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["negative_prompt", "safe_guidance", "soft_end_tokens"])
def test_a_guard_is_saved_as_small_files_and_comes_back_around_its_base_alone(name, tmp_path):
    model, guard = shared("text"), guards()[name]
    before = digest_weights(model.state_dict())
    guard.save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 10_000
    back = load_guard(tmp_path, copy.deepcopy(model))
    images = drawn(guard, [RED, PLAIN])
    assert type(back) is type(guard) and torch.equal(drawn(back, [RED, PLAIN]), images)
    assert torch.equal(drawn(copy.deepcopy(guard), [RED, PLAIN]), images)
    assert not torch.allclose(images[0], drawn(model, [RED])[0], atol=1e-3)
    assert digest_weights(model.state_dict()) == before
    with pytest.raises(BadModel, match="other weights"):
        load_guard(tmp_path, denoiser("text", seed=1))


@pytest.mark.parametrize("name", ["sld", "negative_prompt", "seot"])
def test_the_request_is_answered_by_a_guard_on_weights_that_stayed(name):
    case = text_case()
    outcome = unlearn(case, name, floor=None, concept="red")
    assert outcome.record["changed_fraction"] == 0
    measured = case.task.evaluate(outcome.model, case.split("retain").batches())
    kept = case.task.evaluate(case.model, case.split("retain").batches())
    assert measured["loss"] == pytest.approx(kept["loss"], rel=1e-5)  # no kept prompt holds the concept


def test_a_guard_is_not_put_around_a_guard():
    with pytest.raises(UnmetNeed, match="several concepts to one guard"):
        NegativePrompt(guards()["safe_guidance"], "red")


# -- SLD ---------------------------------------------------------------------------------------------------------------
def by_hand(e_0, e_p, e_s, nu, step, w, delta, s_s, lam, s_m, beta):
    """The card's lines, number by number."""
    e, kept = torch.zeros_like(e_0), torch.zeros_like(e_0)
    for i in range(e_0.numel()):
        n, p, s, v = (float(x.flatten()[i]) for x in (e_0, e_p, e_s, nu))
        mu = min(abs(p - s) * s_s, 1.0) if p - s < lam else 0.0
        gamma = mu * (s - n) + s_m * v
        kept.view(-1)[i] = beta * v + (1 - beta) * gamma
        e.view(-1)[i] = n + w * ((p - n) - (gamma if step >= delta else 0.0))
    return e, kept


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_guided_noise_is_the_slow_loops_over_a_whole_sampling(preset):
    model = shared("text")
    guard = SafeGuidance(model, "red", PRESETS[preset])
    settings = (
        guard.safety.warm_up,
        guard.safety.scale,
        guard.safety.threshold,
        guard.safety.momentum,
        guard.safety.decay,
    )
    told = [model.encode(model.conditions.of([text] * 2)) for text in (RED, "", "red")]
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    memory, nu = {"total": 20}, torch.zeros_like(x)
    with torch.no_grad():
        for step in range(0, 20, 2 if preset == "max" else 1):
            t = torch.tensor(981 - 49 * step)
            memory["step"] = step
            found = guard.guided(x, t, told[0], told[1], 7.5, memory)
            e_0, e_p, e_s = model(x.repeat(3, 1, 1, 1), t, torch.cat([told[1], told[0], told[2]])).chunk(3)
            wanted, nu = by_hand(e_0, e_p, e_s, nu, step, 7.5, *settings)
            assert torch.allclose(found, wanted, atol=1e-5)
            assert torch.allclose(memory["momentum"], nu, atol=1e-5)
            x = x - 0.1 * found


def test_warm_up_counts_steps_and_not_timesteps():
    """The faulty port compares the timestep (981, 781, ...) with delta, which turns guidance from the first step on."""
    model = shared("text")
    wait, never, at_once = (SafeGuidance(model, "red", Safety(d, 1000, 1.0, 0.0, 0.0)) for d in (2, 99, 0))
    seen = {}
    for name, guard in {"base": model, "wait": wait, "never": never, "at once": at_once}.items():
        guided, steps = guard.guided, []

        def watched(*given, guided=guided, steps=steps):
            steps.append(guided(*given))
            return steps[-1]

        guard.guided = watched
        drawn(guard, [RED], steps=5)
        del guard.guided
        seen[name] = steps
    close = lambda a, b: torch.allclose(a, b, atol=1e-5)  # noqa: E731
    assert all(close(a, b) for a, b in zip(seen["never"], seen["base"], strict=True))
    assert close(seen["wait"][0], seen["base"][0]) and close(seen["wait"][1], seen["base"][1])
    assert not close(seen["wait"][2], seen["base"][2]) and not close(seen["at once"][0], seen["base"][0])


def test_momentum_is_gathered_while_guidance_is_still_left_alone():
    away, guidance, towards = torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([0.5])
    safety = Safety(warm_up=1, scale=1000, threshold=0.0, momentum=0.5, decay=0.6)
    first, kept = safety.turned(away, guidance, towards, 0.0, 0)
    second, _ = safety.turned(away, guidance, towards, kept, 1)
    assert float(first) == 2.0 and float(kept) == pytest.approx(0.4 * 0.5)
    assert float(second) == pytest.approx(2.0 - (0.5 + 0.5 * 0.2))


def test_safe_guidance_of_a_velocity_compares_noise():
    """Two networks that say the same noise in two ways: with no momentum, the guided noise is the same."""
    model = denoiser("text", prediction="v_prediction")
    safety, t = Safety(0, 3.0, 0.02, 0.0, 0.0), torch.tensor(400)
    x = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(1))
    told = [model.encode(model.conditions.of(text)) for text in (RED, "", "red")]
    with torch.no_grad():
        found = SafeGuidance(model, "red", safety).guided(x, t, told[0], told[1], 3.0, {"step": 0})
        outputs = model(x.repeat(3, 1, 1, 1), t, torch.cat([told[1], told[0], told[2]])).chunk(3)
        e_0, e_p, e_s = (model.to_noise(x, t, o) for o in outputs)
    wanted, _ = by_hand(e_0, e_p, e_s, torch.zeros_like(x), 0, 3.0, 0, 3.0, 0.02, 0.0, 0.0)
    assert torch.allclose(model.to_noise(x, t, found), wanted, atol=1e-4)


def test_a_class_is_kept_away_from_as_words_are():
    case = class_case()
    guard = unlearn(case, "sld", floor=None, concept="3", preset="max").model
    assert guard.condition.tolist() == [3]
    assert drawn(guard, [3, 4]).shape == (2, 1, 8, 8)


# -- negative prompt ---------------------------------------------------------------------------------------------------
def test_a_negative_prompt_is_the_pipelines_own():
    model = shared("text")
    noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(3))
    wanted = model.pipeline()(
        RED, negative_prompt="red", latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt"
    ).images
    found = sample(NegativePrompt(model, "red"), model.conditions.of(RED), Sampling(4, 3.0), seeds=[3]).images
    assert torch.allclose(found / 2 + 0.5, wanted, atol=1e-4)


# -- SEOT --------------------------------------------------------------------------------------------------------------
def test_singular_values_are_softened_and_directions_stay():
    x = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    values = torch.linalg.svdvals(x.double())
    soft = softened(x, 0.3).double()
    gram = x.double().T @ x.double()  # an eigenbasis of X'X: V, independent of the function's own SVD
    eigenvalues, v = torch.linalg.eigh(gram)
    for s2, direction in zip(eigenvalues, v.T, strict=True):
        s = s2.sqrt()
        assert torch.allclose(soft @ direction, x.double() @ direction * torch.exp(-0.3 * s), atol=1e-5)
    assert torch.allclose(
        torch.linalg.svdvals(soft), (values * torch.exp(-0.3 * values)).sort(descending=True)[0], atol=1e-5
    )
    assert torch.allclose(softened(x, 0.0), x, atol=1e-5)


def test_the_concepts_and_all_end_positions_are_softened_together_and_nothing_else():
    model = shared("text")
    guard = SoftEndTokens(model, "red | crimson", 0.05)
    for prompt, places in {RED: [2], "a crimson three": [2], "three red red": [2, 3]}.items():
        ids = model.conditions.of(prompt)
        end = len(model.conditions.content(ids[0])) + 1
        chosen = [*places, *range(end, 16)]
        own, soft = guard.encode(ids)[0].chunk(2)
        assert torch.equal(own, model.encode(ids)[0])
        rest = [i for i in range(16) if i not in chosen]
        assert torch.equal(soft[rest], own[rest]) and torch.allclose(
            soft[chosen], softened(own[chosen].T, 0.05).T, atol=1e-6
        )
        assert not torch.allclose(soft[chosen], own[chosen], atol=1e-2)
    own, soft = guard.encode(model.conditions.of(PLAIN))[0].chunk(2)
    assert torch.equal(own, soft)


def test_the_loss_of_maps_is_the_slow_loop_over_tokens_and_pixels():
    """Source (2402.05375, eq. 5-8): every word's cross-attention, and the self-attention to each pixel of that word's mask."""
    rng = torch.Generator().manual_seed(0)
    before, now = (
        Seen(*(1 + 0.2 * torch.rand(2, 16, width, generator=rng) for width in (6, 16))) for _ in range(2)
    )  # flat enough for masks of several pixels
    role = torch.tensor([[0.0, 1.0, -0.5, 1.0, 0.0, 0.0], [0.0] * 6])
    apart = lambda a, b: 1 - float(a @ b / (a.norm() * b.norm()))  # noqa: E731
    wanted, pixels = 0.0, 0
    for token, weight in enumerate(role[0].tolist()):
        if not weight:
            continue
        seen = before.words[0, :, token]
        wanted += weight * apart(now.words[0, :, token], seen)
        for pixel in range(16):
            if seen[pixel] >= (0.85 if weight < 0 else 0.95) * seen.max():
                wanted += weight * apart(now.itself[0, :, pixel], before.itself[0, :, pixel])
                pixels += 1
    found = now.moved(before, role)
    assert 3 < pixels < 3 * 16 and float(found[0]) == pytest.approx(wanted, abs=1e-5) and float(found[1]) == 0
    assert float(before.moved(before, role).abs().max()) < 1e-5


def optimised(model, prompts, **settings):
    """(images, loss before and after the iterations of every optimised step, source's latents) of a guard."""
    guard, seen = SoftEndTokens(model, "red", start=0.2, **settings), []
    inner = guard.optimised

    def watched(noisy, source, timestep, own, soft, role, rate):
        found = inner(noisy, source, timestep, own, soft, role, rate)
        losses = []
        for embeddings in (soft, found):
            with torch.no_grad(), attention_maps(model, own=True) as maps:
                model(source, timestep, own)
                before = Seen.of(maps, 4)
                model(noisy, timestep, embeddings)
                losses.append(Seen.of(maps, 4).moved(before, role))
        seen.append((*losses, source, rate))
        return found

    guard.optimised = watched
    return drawn(guard, prompts, steps=10), seen


def test_optimised_embeddings_move_the_concepts_maps_and_leave_other_prompts_alone():
    model = shared("text")
    weights = digest_weights(model.state_dict())
    plain = drawn(SoftEndTokens(model, "red"), [RED, PLAIN], steps=10)
    images, seen = optimised(model, [RED, PLAIN], iterations=3)
    assert [rate for *_, rate in seen] == pytest.approx([20 * (1 - 0.9 * i / 9) ** 0.5 for i in (2, 3)])
    for before, after, _, _ in seen:
        assert float(after[0]) < float(before[0]) and float(after[1]) == float(before[1]) == 0
    assert not torch.allclose(images[0], plain[0], atol=1e-4)
    assert torch.allclose(images[1], plain[1], atol=1e-6)
    assert (
        optimised(model, [PLAIN], iterations=3)[1] == []
    )  # nothing to optimise where no prompt of the batch holds the concept
    assert digest_weights(model.state_dict()) == weights


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_the_maps_to_stay_near_are_of_the_bare_models_own_way(scheduler):
    model, ways = shared("text"), []
    encoded = model.encode(model.conditions.of([RED]))
    sampling = Sampling(10, 3.0, scheduler=scheduler)
    null = model.encode(model.conditions.of([""]))
    noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(5))
    guard = SoftEndTokens(model, "red", iterations=1, until=0.5)
    inner = guard.optimised
    guard.optimised = lambda noisy, source, *rest: (ways.append(source), inner(noisy, source, *rest))[1]
    with torch.no_grad():
        bare = {}
        denoised(model, encoded, null, noise, sampling, [5], watch=lambda n, x: bare.update({n + 1: x}))
        own = [guard.encode(model.conditions.of([prompt])) for prompt in (RED, "")]
        denoised(guard, *own, noise, sampling, [5])
    assert len(ways) == 3
    for number, source in enumerate(ways, start=2):
        assert torch.allclose(source, bare[number], atol=1e-5)


def test_more_tokens_before_a_prompt_move_its_columns():
    model = shared("text")
    guard = SoftEndTokens(model, "red")
    ids, prefix = model.conditions.of(RED), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    own, soft = guard.encode(ids, prefix)[0].chunk(2)
    moved = (own != soft).any(1).nonzero().flatten().tolist()
    assert moved == [2 + 3, *range(4 + 3, 16)]


def test_the_first_fifth_of_a_sampling_is_the_bases_and_the_rest_is_softened():
    model = shared("text")
    guard = SoftEndTokens(model, "red", 1.0, 0.2)
    ids = model.conditions.of(RED)
    own, soft = guard.encode(ids).chunk(2, 1)
    null = guard.encode(model.conditions.of(""))
    x = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for step in range(10):
            t = torch.tensor(901 - 100 * step)
            found = guard.guided(x, t, torch.cat([own, soft], 1), null, 3.0, {"step": step, "total": 10})
            free, told = model(x, t, null[:, :16]), model(x, t, own if step < 2 else soft)
            assert torch.allclose(found, free + 3 * (told - free), atol=1e-5), step
            late = guard(x, t, torch.cat([own, soft], 1))  # outside of a sampling, by the timestep
            assert torch.allclose(late, model(x, t, own if step < 2 else soft), atol=1e-5)


# -- Forget-Me-Not -----------------------------------------------------------------------------------------------------
def step_of(bench, rows=6, seed=1):
    split = bench.splits["forget"]
    batch = bench.fill(split.data.fetch(split.ids[:rows]))
    return bench.step(bench.task.prepare(batch, torch.Generator().manual_seed(seed)), "forget")


def test_the_maps_are_what_the_layers_attend_by():
    """Probabilities times the layer's own values, through its own projection, are the layer's own output."""
    model = shared("text")
    values, outputs, handles = {}, {}, []
    for name, module in model.named_modules():
        if name.endswith("attn2"):
            handles.append(module.to_v.register_forward_hook(lambda m, i, r, name=name: values.update({name: r})))
            handles.append(module.register_forward_hook(lambda m, i, r, name=name: outputs.update({name: r})))
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attention_maps(model) as maps:
        model(x, torch.tensor(500), model.encode(model.conditions.of([RED, PLAIN])))
    for handle in handles:
        handle.remove()
    assert maps and maps.keys() == outputs.keys()
    for name, found in maps.items():
        attention = model.get_submodule(name)
        v = values[name].reshape(2, 16, attention.heads, -1).transpose(1, 2)
        wanted = attention.to_out[0]((found @ v).transpose(1, 2).flatten(2))
        assert torch.allclose(wanted / attention.rescale_output_factor, outputs[name], atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("end_tokens", [False, True])
def test_the_mean_over_rows_has_the_batch_norms_value_and_gradient(end_tokens):
    case = text_case()
    bench = Workbench(case, copy.deepcopy(case.model))
    step = step_of(bench)
    own = attention_norm("red | crimson", "a photo of {}", end_tokens)(step)
    ids = torch.cat([bench.model.conditions.of(f"a photo of {('red', 'crimson')[int(i) % 2]}") for i in step.batch.ids])
    t = (step.batch["level"] * 1000).long()
    noisy = bench.model.noised(step.batch["latents"], step.batch["noise"], t)
    picked = []
    with attention_maps(bench.model) as maps:
        bench.model(noisy, t, bench.model.encode(ids))
    for a in maps.values():
        picked.append(
            a[:, :, :, 4:].flatten() if end_tokens else a[:, :, :, 4].flatten()
        )  # start a photo of RED end ...
    norm = torch.cat(picked).norm()
    assert len(own) == 6 and float(own.mean().detach()) == pytest.approx(float(norm.detach()), rel=1e-5)
    weights = [p for n, p in bench.model.named_parameters() if n.endswith(("attn2.to_k.weight", "attn2.to_q.weight"))]
    for a, b in zip(torch.autograd.grad(own.mean(), weights), torch.autograd.grad(norm, weights), strict=True):
        assert torch.allclose(a, b, atol=1e-6 * float(b.abs().max() + 1)) and float(b.abs().max()) > 0


def test_rows_whose_own_prompts_do_not_hold_the_concept_count_for_nothing():
    case = text_case()
    bench = Workbench(case, case.model)
    step = step_of(bench, 3)
    ids = bench.model.conditions.of([RED, PLAIN, "three red red"])
    step.batch = bench.task.with_condition(step.batch, ids)
    objective = attention_norm("red", end_tokens=True)
    assert objective.watched(bench.model, ids).nonzero().tolist() == [
        [0, 2], *[[0, i] for i in range(4, 16)], [2, 2], [2, 3], *[[2, i] for i in range(4, 16)]
    ]  # fmt: skip
    shares = objective(step)
    assert not bool(shares[1]) and bool((shares[[0, 2]] > 0).all())


def test_forget_me_not_turns_attention_away_and_moves_its_scope_alone():
    case = text_case()
    plain = Workbench(case, case.model)
    objective = attention_norm("red | crimson", "a photo of {}")
    outcome = unlearn(
        case, "forget_me_not", floor=None, concept="red | crimson", scope="attention", steps=8, lr=3e-3, batch_size=5
    )
    after = Workbench(case, outcome.model)
    assert float(objective(step_of(after)).mean().detach()) < 0.8 * float(objective(step_of(plain)).mean().detach())
    old = case.model.state_dict()
    moved = {name for name, v in outcome.model.state_dict().items() if not torch.equal(v, old[name])}
    assert moved and all("attentions" in name for name in moved)


def test_from_noise_alone_no_image_is_read():
    case = text_case()
    bench = Workbench(case, case.model)
    objective = attention_norm("red", "a photo of {}", pure_noise=True)
    step, other = step_of(bench), step_of(bench)
    other.batch = other.batch.with_columns(latents=-other.batch["latents"])
    assert torch.equal(objective(step), objective(other))
    with_images = attention_norm("red", "a photo of {}")
    assert not torch.equal(with_images(step), with_images(other))


# -- SPM ---------------------------------------------------------------------------------------------------------------
def adapters(model, concepts=("red | crimson",), seed=0, **settings):
    guard = ConceptAdapters(model, concepts, seed=seed, **settings)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in guard.adapters:
            for up in adapter.up:
                up.copy_(0.3 * torch.randn(up.shape, generator=rng))
    return guard.eval()


def merged(guard, multipliers):
    """The base with W + sum_k m_k (alpha / r) U_k D_k written into its weights."""
    model = copy.deepcopy(guard.base)
    with torch.no_grad():
        for number, layer in enumerate(adapted_layers(model).values()):
            for m, adapter in zip(multipliers, guard.adapters, strict=True):
                product = torch.einsum("or,r...->o...", adapter.up[number], adapter.down[number])
                layer.weight += m * guard.alpha / guard.rank * product
    return model


def test_adapters_are_on_every_linear_and_convolution_of_the_transformer_blocks():
    names = set(adapted_layers(shared("text")))
    every = {
        n for n, m in shared("text").unet.named_modules()
        if type(m) in (torch.nn.Linear, torch.nn.Conv2d) and ".attentions." in n
    }  # fmt: skip
    assert names == every and any(n.endswith("proj_in") for n in names) and any("ff.net" in n for n in names)


def test_an_adapter_that_has_learnt_nothing_or_is_shut_leaves_the_base_bit_for_bit():
    model = shared("text")
    images = drawn(model, [RED, PLAIN])
    assert torch.equal(drawn(ConceptAdapters(model, ["red"]), [RED, PLAIN]), images)
    assert torch.equal(drawn(adapters(model, strength=0.0), [RED, PLAIN]), images)
    assert not torch.allclose(drawn(adapters(model), [RED, PLAIN]), images, atol=1e-2)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("rank", [1, 3])
def test_several_adapters_are_the_merged_weights_of_their_sum(rank):
    guard = adapters(shared("text"), ["red | crimson", "three"], rank=rank, alpha=2.0)
    x = torch.randn(2, *guard.shape, generator=torch.Generator().manual_seed(0))
    ids, t = guard.conditions.of([RED, "a plain seven"]), torch.tensor(300)
    told = guard.encode(ids)
    multipliers = guard.multipliers(ids, guard.base.encode(ids))
    with torch.no_grad():
        found = guard(x, t, told)
        for row in range(2):  # each by its own multipliers, in one batch
            alone = merged(guard, multipliers[row].tolist())
            wanted = alone(x[row : row + 1], t, told[row : row + 1, :-1])
            assert torch.allclose(found[row : row + 1], wanted, atol=1e-4)
    assert multipliers[0].tolist() == [1.0, 1.0]


def test_the_multiplier_is_the_larger_of_cosine_and_shared_tokens():
    guard = ConceptAdapters(shared("text"), ["red three | crimson"])
    flat = lambda text: guard.base.encode(guard.conditions.of(text)).flatten().double()  # noqa: E731
    for prompt, share in {"a red three": 1.0, "a red": 0.5, "a crimson seven": 1.0, "a plain seven": 0.0}.items():
        ids = guard.conditions.of(prompt)
        own = flat(prompt)
        cosines = [float(own @ flat(c) / own.norm() / flat(c).norm()) for c in ("red three", "crimson")]
        found = float(guard.multipliers(ids, guard.base.encode(ids)))
        assert found == pytest.approx(min(max(*cosines, share), 1.0), abs=1e-5)


def test_both_halves_of_guidance_pass_by_the_prompts_multiplier():
    guard = adapters(shared("text"), ["red"])
    x, t = torch.randn(1, *guard.shape, generator=torch.Generator().manual_seed(0)), torch.tensor(600)
    told, null = (guard.encode(guard.conditions.of(text)) for text in (RED, ""))
    assert float(told[0, -1, 0]) == 1 and float(null[0, -1, 0]) < 0.99
    alone = merged(guard, [1.0])
    with torch.no_grad():
        free, asked = (alone(x, t, c[:, :-1]) for c in (null, told))
        assert torch.allclose(guard.guided(x, t, told, null, 3.0, {}), free + 3 * (asked - free), atol=1e-4)


def test_anchors_have_the_targets_size_and_shun_its_direction():
    target = torch.tensor([[3.0, 4.0]])
    found = drawn_embeddings(target, 3000, torch.Generator().manual_seed(0)).flatten(1)
    sizes = found.norm(dim=1) / 5
    assert 0.8 <= float(sizes.min()) < 0.81 and 1.19 < float(sizes.max()) <= 1.2
    # on a circle, kept with probability min(1, 1 - cos): the mean cosine is -(pi / 4) / (pi - 1) = -0.367
    cosines = found @ target[0] / found.norm(dim=1) / 5
    assert float(cosines.mean()) == pytest.approx(-(math.pi / 4) / (math.pi - 1), abs=0.04)


def test_anchoring_is_the_mean_over_anchors_of_the_distance_to_the_original(monkeypatch):
    case = text_case()
    guard = adapters(case.model, ["red"], gate=False)
    bench = Workbench(case, case.model)
    step = step_of(bench, 2)
    step.model = guard
    x = torch.randn(2, *guard.shape, generator=torch.Generator().manual_seed(0))
    step.batch = step.batch.with_columns(noisy=x, timestep=torch.tensor([100, 700]))
    seen = []
    monkeypatch.setattr(
        "expunge.parts.objectives.random_conditions.drawn_embeddings",
        lambda *given: seen.append(drawn_embeddings(*given)) or seen[-1],
    )
    with torch.no_grad():
        found = keep_around(3)(step)
        for row in range(2):
            t = step.batch["timestep"][row]
            errors = [
                (merged(guard, [1.0])(x[row : row + 1], t, a[None]) - case.model(x[row : row + 1], t, a[None])).square().mean()
                for a in seen[row]
            ]  # fmt: skip
            assert float(found[row]) == pytest.approx(float(sum(errors) / 3), rel=1e-3)
        step.model = ConceptAdapters(case.model, ["red"], gate=False)
        assert not bool(keep_around(3)(step).any())


def test_training_moves_adapters_alone_samples_once_a_step_and_survives_disk(monkeypatch, tmp_path):
    redirect = importlib.import_module("expunge.parts.objectives.redirect")
    calls, partial = [], redirect.partial
    monkeypatch.setattr(redirect, "partial", lambda *given: calls.append(1) or partial(*given))
    case = text_case()
    settings = {"steps": 5, "batch_size": 4, "lr": 1e-2, "sampling_steps": 3, "warmup": 0.0}
    outcome = unlearn(case, "spm", floor=None, concept=("red | crimson", "striped"), **settings)
    assert len(calls) == 10  # two adapters, five steps each; both terms of a step see the same x_t
    guard = outcome.model
    assert outcome.record["changed_fraction"] == 0
    assert all(float(up.abs().max()) > 0 for adapter in guard.adapters for up in adapter.up)
    guard.save_pretrained(tmp_path)
    back = load_guard(tmp_path, copy.deepcopy(case.model))
    assert torch.equal(drawn(back, [RED, PLAIN]), drawn(guard, [RED, PLAIN]))
    kept = sum(v.numel() for v in guard.tensors().values())
    assert kept < 0.35 * sum(p.numel() for p in case.model.unet.parameters())


class Killed(Exception):
    pass


TWO_CONCEPTS = {
    "concept": ("red | crimson", "striped"), "steps": 3, "batch_size": 4, "lr": 1e-2, "sampling_steps": 3,
}  # fmt: skip


@functools.cache
def both_adapters():
    """The undisturbed run, and how often it sampled."""
    redirect = importlib.import_module("expunge.parts.objectives.redirect")
    calls, partial = [], redirect.partial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redirect, "partial", lambda *given: calls.append(1) or partial(*given))
        return unlearn(text_case(), "spm", floor=None, **TWO_CONCEPTS), len(calls)


@pytest.mark.parametrize("after", [2, 5])
def test_training_of_adapters_resumes_to_the_same_tensors(after, monkeypatch, tmp_path):
    """Killed in the first concept's adapter, or in the second's: the steps before are not made again."""
    redirect = importlib.import_module("expunge.parts.objectives.redirect")
    calls, partial, reports, settings = [], redirect.partial, [], TWO_CONCEPTS
    whole, sampled = both_adapters()
    assert sampled == 6 and whole.record["updates"] == 6
    monkeypatch.setattr(redirect, "partial", lambda *given: calls.append(1) or partial(*given))
    assert {entry["phase"] for entry in whole.record["history"]} == {0, 1}

    def kill(*_):
        reports.append(1)
        if len(reports) == after:
            raise Killed

    with pytest.raises(Killed):
        unlearn(text_case(), "spm", floor=None, run=tmp_path, checkpoint_steps=1, report=kill, **settings)
    made = len(calls)
    resumed = unlearn(text_case(), "spm", floor=None, run=tmp_path, checkpoint_steps=1, **settings)
    assert made < 6 and len(calls) <= 7  # at most the step that was under way is made twice
    ours, theirs = resumed.model.tensors(), whole.model.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert any(bool(v.any()) for k, v in ours.items() if ".up." in k)
    assert resumed.record["history"] == whole.record["history"]


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["seot", "forget_me_not", "spm"])
def test_models_without_cross_attention_are_refused_by_name(name):
    with pytest.raises(UnmetNeed, match=f"cross-attention for {name}"):
        find(name).configure(concept=("3",) if name == "spm" else "3").action(class_case())


@pytest.mark.parametrize("name", ["sld", "negative_prompt", "seot", "forget_me_not", "spm"])
def test_a_concept_that_the_tokenizer_cannot_write_is_refused(name):
    case, calls = text_case(), []
    case.model.others["tokenizer"] = Unknowing(case.model.tokenizer, calls)
    with pytest.raises(BadSetting, match="tokenizer can write, found 'Ω'"):
        find(name).configure(concept=("Ω",) if name == "spm" else "Ω").action(case)
    assert calls


class Unknowing:
    """A tokenizer that says so when it knows no token."""

    unk_token_id = -7

    def __init__(self, inner, calls):
        self.inner, self.calls = inner, calls

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, **settings):
        self.calls.append(text)
        return type("Ids", (), {"input_ids": [-7]})() if text == "Ω" else self.inner(text, **settings)
