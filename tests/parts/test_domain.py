"""Domain matching by a discriminator: labels, shapes, and what is compared."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from expunge import unlearn
from expunge.engine.workbench import Workbench
from expunge.errors import BadModel
from expunge.parts.objectives.domain import PatchDiscriminator, deceive_domain, tell_domains
from expunge.parts.objectives.redirect import first_token_still
from tiny_pipelines import text_case

DOCO = {"concept": "red", "anchor": "plain", "images": 12, "batch_size": 4, "lr": 1e-3}


@pytest.mark.parametrize(("size", "places", "deep"), [(64, 3, 4), (32, 1, 4), (16, 1, 3), (8, 1, 2), (4, 1, 1)])
def test_the_discriminators_last_map_has_a_place_at_every_size(size, places, deep):
    net = PatchDiscriminator(3, size, width=4)
    assert net(torch.randn(2, 3, size, size)).shape == (2, 1, places, places)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == deep + 1
    assert not isinstance(net.body[1], torch.nn.BatchNorm2d)  # none after the first
    with pytest.raises(BadModel, match="4x4"):
        PatchDiscriminator(3, 2)


@pytest.fixture
def bench():
    case = text_case()
    bench = Workbench(case, case.model)
    torch.manual_seed(0)
    bench.networks["discriminator"] = PatchDiscriminator(3, 8, width=8).eval()
    return bench


def step_of(bench, objective):
    batch = bench.fill(bench.splits["forget"].data.fetch(bench.splits["forget"].ids))
    return bench.step(bench.task.prepare(batch, torch.Generator().manual_seed(1)), "forget", objective)


def test_the_original_is_domain_0_and_the_model_domain_1_in_both_losses(bench):
    """A flip in one of the two makes the model run away from the anchor."""
    tell, deceive = tell_domains("red -> plain"), deceive_domain("red -> plain")
    step = step_of(bench, tell)
    with torch.no_grad():
        theirs, ours = tell.originals(step), tell.models(step)
        judge = bench.networks["discriminator"]
        a, u = judge(theirs).flatten(1), judge(ours).flatten(1)
    assert torch.allclose(tell(step), F.softplus(a).mean(1) + F.softplus(-u).mean(1), atol=1e-6)
    assert torch.allclose(deceive(step), F.softplus(u).mean(1), atol=1e-6)
    assert float(tell(step).mean()) == pytest.approx(2 * math.log(2), abs=0.1)  # an untrained one cannot tell


def test_clean_images_are_compared_not_noises(bench):
    """x = (z_t - sqrt(1 - abar) eps) / sqrt(abar), the model under the row's prompt, the original under the anchor's."""
    tell = tell_domains("red -> plain")
    step = step_of(bench, tell)
    batch, model = step.batch, bench.model
    t = (batch["level"] * 1000).long()
    kept = model.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * batch["latents"] + (1 - kept).sqrt() * batch["noise"]
    for prompts, found in ((batch["input_ids"], tell.models(step)),
                           (model.conditions.replaced(batch["input_ids"], "red -> plain"), tell.originals(step))):  # fmt: skip
        noise = model.unet(noisy, t, encoder_hidden_states=model.text_encoder(prompts)[0]).sample
        assert torch.allclose(found, (noisy - (1 - kept).sqrt() * noise) / kept.sqrt(), rtol=1e-4, atol=1e-4)


def test_equal_prompts_and_equal_weights_give_equal_domains(bench):
    tell = tell_domains("own")
    step = step_of(bench, tell)
    assert torch.equal(tell.originals(step), tell.models(step))


def test_the_first_tokens_keys_carry_no_gradient_when_still(bench):
    model = bench.model
    encoded = model.encode(model.conditions.of(["a red three"])).detach().requires_grad_(True)
    noisy, t = torch.randn(1, 3, 8, 8), torch.tensor([500])
    with first_token_still(model):
        (g,) = torch.autograd.grad(model(noisy, t, encoded).square().sum(), encoded)
    assert not bool(g[:, 0].any()) and bool(g[:, 1].any())
    (free,) = torch.autograd.grad(model(noisy, t, encoded).square().sum(), encoded)
    assert bool(free[:, 0].any())


def test_doco_moves_keys_and_values_of_cross_attention_alone_and_draws_anchors():
    case = text_case()
    outcome = unlearn(case, "doco", floor=None, steps=3, warm_up=2, **DOCO)
    moved = {n for n, v in outcome.model.state_dict().items() if not torch.equal(v, case.model.state_dict()[n])}
    assert moved and all("attn2.to_k" in n or "attn2.to_v" in n for n in moved)
    names = list(outcome.record["history"][0]["losses"])
    assert any("drawn for (red -> plain)" in n for n in names) and any(n.startswith("discriminator") for n in names)


def test_the_warm_up_moves_the_discriminator_alone_and_the_release_scales_otherwise():
    case = text_case()
    models = {
        key: unlearn(case, "doco", floor=None, steps=2, **DOCO | settings).model.state_dict()
        for key, settings in {
            "plain": {"warm_up": 0}, "warmed": {"warm_up": 3}, "released": {"warm_up": 0, "surgery": "released"},
            "none": {"warm_up": 0, "surgery": "none"}, "lambda 0": {"warm_up": 0, "strength": 0.0},
        }.items()
    }  # fmt: skip
    name = next(n for n in models["plain"] if "attn2.to_k" in n)
    others = [k for k in models if k != "plain" and torch.equal(models[k][name], models["plain"][name])]
    assert not others, "all of these settings change what is stepped"
