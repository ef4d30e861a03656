"""The denoiser interface, the task, conditions, sampling and tables: against algebra, slow loops and diffusers itself."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")

from diffusion_nets import denoiser, pipeline, shared
from expunge import Case, Optimizer, Plan, Sampling, Term, imagined, load_model, pictures, requests, sample, unlearn
from expunge.cases.loading import load_pipeline
from expunge.errors import BadData, BadModel, BadSetting, UnmetNeed
from expunge.files import digest_weights
from expunge.parts import component, fit, redirect
from expunge.parts.objectives import negated, relabel
from expunge.parts.objectives.redirect import Partial
from expunge.seeds import generator
from expunge.tasks import Diffusion
from expunge.tasks.denoiser import Denoiser
from expunge.tasks.sampling import denoised, noises, partial

TASK = Diffusion()
PROMPTS = ["a red three", "a plain seven", "an inverted two", "a striped one"]


def images(count: int, channels: int = 3) -> torch.Tensor:
    return torch.rand((count, channels, 8, 8), generator=generator(0, "pictures")) * 2 - 1


def text_case(model: Denoiser, each: int = 4) -> Case:
    prompts = [p for p in PROMPTS for _ in range(each)]
    style = torch.arange(len(PROMPTS)).repeat_interleave(each)
    return Case(model, pictures(model, images(len(prompts)), prompts=prompts, style=style),
                requests.where("style", "==", 0), task="diffusion")  # fmt: skip


def class_case(model: Denoiser, each: int = 4) -> Case:
    labels = torch.arange(4).repeat_interleave(each)
    return Case(model, pictures(model, images(len(labels), 1), labels=labels), requests.label(0), task="diffusion")


def batch_of(case: Case, split: str = "forget", seed: int = 0):
    rows = case.split(split)
    return TASK.prepare(rows.data.fetch(rows.ids), generator(seed, "draw"))


# -- predictions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_every_prediction_gives_back_the_clean_latents_and_the_noise(kind):
    model = denoiser("class", **({"flow": True} if kind == "flow" else {"prediction": kind}))
    assert model.prediction_type == kind
    clean, noise = images(6, 1), torch.randn((6, 1, 8, 8), generator=generator(0, "noise"))
    t = torch.tensor([1, 50, 200, 400, 700, 900])
    noisy, said = model.noised(clean, noise, t), model.target(clean, noise, t)
    torch.testing.assert_close(model.to_clean(noisy, t, said), clean, rtol=0, atol=2e-5)
    torch.testing.assert_close(model.to_noise(noisy, t, said), noise, rtol=0, atol=2e-5)
    torch.testing.assert_close(model.from_noise(noisy, t, noise), said, rtol=0, atol=2e-4)


def test_noising_is_the_scheduler_s_own():
    model, clean = shared("class"), images(5, 1)
    noise, t = torch.randn_like(clean), torch.tensor([0, 3, 500, 900, 999])
    torch.testing.assert_close(model.noised(clean, noise, t), model.scheduler.add_noise(clean, noise, t))


def test_a_target_with_weights_summing_to_one_is_the_same_recipe_for_every_prediction():
    clean, t = images(4, 1), torch.tensor([5, 100, 500, 900])
    noise = torch.randn((4, 1, 8, 8), generator=generator(0, "noise"))
    found = []
    for settings in ({"prediction": "epsilon"}, {"prediction": "v_prediction"}, {"prediction": "sample"}):
        model = denoiser("class", **settings)
        noisy = model.noised(clean, noise, t)
        eps = [torch.randn((4, 1, 8, 8), generator=generator(k, "eps")) for k in range(2)]
        outs = [model.from_noise(noisy, t, e) for e in eps]
        mixed = outs[0] - 1.5 * (outs[1] - outs[0])
        found.append(model.to_noise(noisy, t, mixed))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-2)


def test_unknown_prediction_is_refused():
    made = pipeline("class")
    made.scheduler.register_to_config(prediction_type="velocity")
    with pytest.raises(BadModel, match="prediction_type is one of epsilon, sample, v_prediction"):
        Denoiser(made)


# -- conditions --------------------------------------------------------------------------------------------------------
def test_words_are_replaced_by_their_tokens_and_the_rest_stays():
    conditions = shared("text").conditions
    ids = conditions.of(["a red three", "a crimson red two", "a plain one"])
    new = conditions.replaced(ids, "red | crimson -> plain")
    assert torch.equal(new, conditions.of(["a plain three", "a plain plain two", "a plain one"]))
    assert conditions.contains(ids, "red").tolist() == [True, True, False]
    assert torch.equal(conditions.replaced(ids, "null"), conditions.of([""] * 3))
    assert torch.equal(conditions.replaced(ids, "an inverted two"), conditions.of(["an inverted two"] * 3))
    assert torch.equal(conditions.replaced(ids, "red -> "), conditions.of(["a three", "a crimson two", "a plain one"]))


def test_a_concept_without_a_token_is_refused():
    with pytest.raises(BadSetting, match="that the model's tokenizer can write"):
        shared("text").conditions.words("赤")


def test_classes_go_round_and_the_null_stays():
    conditions = shared("class").conditions
    ids = torch.tensor([0, 8, 9, 10])
    assert conditions.replaced(ids, "next").tolist() == [1, 9, 0, 10]
    assert conditions.replaced(ids, "3").tolist() == [3] * 4
    assert conditions.like(ids).tolist() == [10] * 4
    with pytest.raises(BadSetting, match="a class in 0..9, found 10"):
        conditions.replaced(ids, "10")
    with pytest.raises(BadSetting, match="a rule for classes"):
        conditions.replaced(ids, "red -> plain")


def test_a_model_without_a_null_class_says_so():
    model = Denoiser(pipeline("class"), null=None)
    assert model.conditions.count == 11
    with pytest.raises(UnmetNeed, match="a model with a null class"):
        sample(model, torch.tensor([0]), Sampling(2, 2.0))
    assert sample(model, torch.tensor([0]), Sampling(2, 1.0)).images.shape == (1, 1, 8, 8)


def test_labels_at_the_null_id_are_refused():
    model = shared("class")
    with pytest.raises(BadData, match="10, which is the null class"):
        Case(model, pictures(model, images(4, 1), labels=[0, 1, 2, 10]), requests.label(0), task="diffusion")


def test_prefix_and_words_override_the_encoder_s_embeddings():
    model = shared("text")
    ids = model.conditions.of(["a red three"])
    table = model.text_encoder.get_input_embeddings().weight
    plain = model.encode(ids)
    torch.testing.assert_close(model.encode(ids, words=table[ids]), plain, rtol=0, atol=1e-6)
    word = table[model.conditions.words("crimson")]
    spliced = model.conditions.of(["crimson a red three"])
    torch.testing.assert_close(model.encode(ids, prefix=word), model.encode(spliced), rtol=0, atol=1e-6)
    assert model.encode(ids, prefix=word).shape == plain.shape
    with pytest.raises(UnmetNeed, match="a shorter prefix"):
        model.encode(ids, prefix=table[:16])


# -- the task ----------------------------------------------------------------------------------------------------------
def test_loss_is_the_plain_denoising_error():
    model = shared("text")
    case = text_case(model)
    batch = batch_of(case)
    with torch.no_grad():
        output = TASK.forward(model, batch)
        t = (batch["level"] * 1000).long()
        noisy = model.scheduler.add_noise(batch["latents"], batch["noise"], t)
        hidden = model.text_encoder(batch["input_ids"])[0]
        said = torch.cat([model.unet(noisy[i : i + 1], t[i], hidden[i : i + 1]).sample for i in range(len(batch))])
    expected = (said - batch["noise"]).square().mean((1, 2, 3))
    torch.testing.assert_close(TASK.loss(output, batch), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(TASK.log_likelihood(output, batch), -TASK.loss(output, batch))


def test_equal_seeds_draw_equal_noise_and_timesteps_stay_in_their_band():
    case = class_case(shared("class"))
    one, two = batch_of(case, seed=1), batch_of(case, seed=1)
    assert torch.equal(one["noise"], two["noise"]) and torch.equal(one["level"], two["level"])
    narrow = Diffusion(min_timestep=0.2, max_timestep=0.3)
    many = one.with_columns(level=torch.linspace(0, 0.9999, 200))
    steps = narrow.timestep(shared("class"), many)
    assert int(steps.min()) == 200 and int(steps.max()) == 299
    flow = denoiser("class", flow=True)
    steps = TASK.timestep(flow, many)
    assert int(steps.min()) == 1 and int(steps.max()) == 1000


def test_relabel_keeps_the_condition_and_gives_another_image():
    case = class_case(shared("class"))
    batch = batch_of(case).with_columns(**TASK.constants(case.model, case.data))
    other = TASK.relabel(batch, generator(0, "relabel"), "other")
    assert torch.equal(other["labels"], batch["labels"])
    rows = case.data.column("latents")
    for image in other["latents"]:
        where = (rows == image).flatten(1).all(1).nonzero()
        assert case.data.column("labels")[where] != 0
    noise = TASK.relabel(batch, generator(0, "relabel"), "noise")["latents"]
    assert noise.min() >= -1 and noise.max() <= 1 and noise.std() == pytest.approx(1 / 3**0.5, abs=0.05)
    with pytest.raises(BadSetting, match="a relabel policy of diffusion"):
        TASK.relabel(batch, generator(0, "x"), "refusal")


# -- objectives --------------------------------------------------------------------------------------------------------
def step_of(case: Case, split: str = "forget"):
    from expunge.engine.workbench import Workbench
    from expunge.parts.references import References

    references = References(case.task, make={"original": lambda: case.model}, steady=True)
    bench = Workbench(case, case.model, 0, torch.device("cpu"), references=references)
    rows = case.split(split)
    return bench.step(case.task.prepare(rows.data.fetch(rows.ids), generator(0, "draw")), split)


def test_redirect_is_zero_to_oneself_and_the_plain_difference_otherwise():
    case = class_case(shared("class"))
    step = step_of(case)
    assert float(redirect("0")(step).abs().max()) == 0.0
    batch = step.batch
    t = TASK.timestep(case.model, batch)
    noisy = case.model.noised(batch["latents"], batch["noise"], t)
    with torch.no_grad():
        own, other = case.model(noisy, t, batch["labels"]), case.model(noisy, t, batch["labels"] + 1)
    value = redirect("next")(step)
    torch.testing.assert_close(value, (own - other).square().mean((1, 2, 3)))
    assert value.requires_grad  # through the answered side only
    dropped = redirect("0", drop=0.5)(step_of(case))
    assert float(dropped.max()) > 0  # one side none, the other not


def test_negated_is_esd_s_target():
    case = class_case(shared("class"))
    step = step_of(case)
    t = TASK.timestep(case.model, step.batch)
    noisy = case.model.noised(step.batch["latents"], step.batch["noise"], t)
    with torch.no_grad():
        told, free = case.model(noisy, t, step.batch["labels"]), case.model(noisy, t, torch.full((4,), 10))
    target = free - 1.5 * (told - free)
    value = negated(1.5, latents=None)(step)
    torch.testing.assert_close(value, (told - target).square().mean((1, 2, 3)))


def test_partial_sampling_is_the_sampler_left_early():
    model = shared("class")
    condition, sampling = torch.tensor([3, 4]), Sampling(8, 2.0, scheduler="ddim")
    noisy, t = partial(model, condition, sampling, 5, generator(0, "partial"))
    noise = torch.randn((2, 1, 8, 8), generator=generator(0, "partial"))
    with torch.no_grad():
        slow, at = denoised(model, condition, torch.full((2,), 10), noise, sampling, [0, 0], stop_at=5)
    torch.testing.assert_close(noisy, slow)
    assert torch.equal(t, at.expand(2)) and int(at) == int(sampling.stepper(model).timesteps[5])
    step = step_of(class_case(model))
    batch = Partial("student", sampling)(step)
    assert batch["noisy"].shape == step.batch["latents"].shape and batch["timestep"].unique().numel() == 1


# -- sampling ----------------------------------------------------------------------------------------------------------
def test_one_batch_draws_what_the_pipeline_draws_prompt_by_prompt():
    model = shared("text")
    made = sample(model, model.conditions.of(PROMPTS), Sampling(6, 3.0), seeds=[5, 6, 7, 8])
    for prompt, seed, image in zip(PROMPTS, [5, 6, 7, 8], made.images, strict=True):
        own = model.pipeline()
        own.set_progress_bar_config(disable=True)
        theirs = own(prompt, num_inference_steps=6, guidance_scale=3.0, output_type="pt",
                     generator=torch.Generator().manual_seed(seed)).images[0] * 2 - 1  # fmt: skip
        torch.testing.assert_close(image, theirs, rtol=0, atol=1e-4)


def latent_model() -> Denoiser:
    """The text pipeline with an autoencoder that halves 16 x 16 to 8 x 8 and scales as Stable Diffusion's does."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        autoencoder = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=3, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.18215, sample_size=16,
        )  # fmt: skip
    parts = {**shared("text").pipeline().components, "vae": autoencoder.eval()}
    return Denoiser(type(shared("text").pipeline())(**parts, requires_safety_checker=False)).eval()


def test_latents_are_scaled_on_the_way_in_and_out():
    model = latent_model()
    made = sample(model, model.conditions.of(PROMPTS[:2]), Sampling(4, 3.0), seeds=[5, 6])
    assert made.images.shape[1:] == (3, 16, 16)
    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    for prompt, seed, image in zip(PROMPTS, [5, 6], made.images, strict=False):
        theirs = pipe(prompt, num_inference_steps=4, guidance_scale=3.0, output_type="pt",
                      generator=torch.Generator().manual_seed(seed)).images[0] * 2 - 1  # fmt: skip
        torch.testing.assert_close(image, theirs, rtol=0, atol=1e-4)
    pictures_ = torch.rand((2, 3, 16, 16), generator=generator(0, "large")) * 2 - 1
    with torch.no_grad():
        own = pipe.vae.encode(pictures_).latent_dist.mean * 0.18215
        torch.testing.assert_close(model.latents(pictures_), own)
        torch.testing.assert_close(model.images(own), pipe.vae.decode(own / 0.18215).sample.clamp(-1, 1))


def test_a_transformer_of_classes_is_a_denoiser_as_well():
    """DiT, which learns its noise's variance beside the noise: it is sampled, and an eraser moves it."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=1, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
        )  # fmt: skip
    vae = latent_model().pipeline().vae
    model = Denoiser(
        DiTPipeline(network, vae, DDIMScheduler(clip_sample=False), id2label={i: str(i) for i in range(10)})
    )
    labels = torch.arange(4).repeat_interleave(2)
    pictures_ = torch.rand((8, 3, 16, 16), generator=generator(0, "large")) * 2 - 1
    case = Case(model, pictures(model, pictures_, labels=labels), requests.label(0), task="diffusion")
    assert sample(model, model.conditions.of([1, 2]), Sampling(2, 2.0), seeds=[1, 2]).images.shape == (2, 3, 16, 16)
    outcome = unlearn(case, "esd", scope="all", steps=1, sampling_steps=2, batch_size=2, lr=1e-3, floor=None)
    moved = {
        n.split(".")[0]
        for n, p in outcome.model.named_parameters()
        if not torch.equal(p, dict(model.named_parameters())[n])
    }
    assert moved == {"transformer"}


def test_an_image_does_not_depend_on_its_batch_and_conventions_differ_by_one():
    model = shared("class")
    condition = torch.arange(5)
    whole = sample(model, condition, Sampling(5, 2.0, scheduler="ddpm"), seeds=list(range(5)))
    parts = sample(model, condition, Sampling(5, 2.0, scheduler="ddpm"), seeds=list(range(5)), batch_size=2)
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-5)
    theirs = sample(model, condition, Sampling(5, 1.0, convention="ddpm", scheduler="ddpm"), seeds=list(range(5)))
    assert torch.equal(whole.images, theirs.images)
    with pytest.raises(BadSetting, match="one seed for each of 5"):
        sample(model, condition, seeds=[1, 2])


def test_samples_with_nan_are_dropped_and_counted():
    model = denoiser("class")
    honest = model.guided

    def broken(noisy, timestep, encoded, null, scale, memory):
        value = honest(noisy, timestep, encoded, null, scale, memory)
        value[0] = float("nan")
        return value

    model.guided = broken
    made = sample(model, torch.arange(3), Sampling(3, 2.0))
    assert made.finite.tolist() == [False, True, True] and made.dropped == 1
    assert torch.isfinite(made.images).all()


def test_row_noise_is_what_a_pipeline_draws_for_its_seed():
    assert torch.equal(
        noises([3, 9], (1, 4, 4))[1:], torch.randn((1, 1, 4, 4), generator=torch.Generator().manual_seed(9))
    )


# -- tables ------------------------------------------------------------------------------------------------------------
def test_tables_refuse_what_does_not_fit():
    model = shared("text")
    with pytest.raises(BadData, match="expected prompts for a text-conditional model, found class conditions"):
        pictures(model, images(2), labels=[0, 1])
    with pytest.raises(BadData, match=r"images in \[-1, 1\], found values from"):
        pictures(model, images(2) * 100, prompts=PROMPTS[:2])
    with pytest.raises(BadData, match="images of 3 channels, found 1"):
        pictures(model, images(2, 1), prompts=PROMPTS[:2])
    with pytest.raises(BadData, match="as floats"):
        pictures(model, (images(2) > 0).to(torch.uint8), prompts=PROMPTS[:2])
    other = torch.nn.functional.interpolate(images(2), 16)
    assert pictures(model, other, prompts=PROMPTS[:2]).column("latents").shape == (2, 3, 8, 8)


def test_a_table_of_the_model_s_own_images():
    model = shared("text")
    data = imagined(model, PROMPTS[:2], count=3, sampling=Sampling(2, 2.0), style=[0, 1])
    assert len(data) == 6 and data.column("style").tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(data.column("input_ids")[3], model.conditions.of(PROMPTS[1])[0])
    broken = denoiser("text")
    broken.guided = lambda noisy, *_: torch.full_like(noisy, float("nan"))
    with pytest.raises(BadData, match="found NaN in all 2"):
        imagined(broken, PROMPTS[:1], count=2, sampling=Sampling(2, 2.0))


def test_a_plain_module_is_refused_with_the_way_to_wrap_it():
    model = shared("class")
    with pytest.raises(BadModel, match="expected the model as a Denoiser"):
        Case(
            torch.nn.Linear(2, 2),
            pictures(model, images(4, 1), labels=[0, 1, 2, 3]),
            requests.label(0),
            task="diffusion",
        )


def test_half_precision_on_a_cpu_is_refused():
    model = denoiser("class").half()
    with pytest.raises(BadModel, match="float16"):
        Case(model, pictures(shared("class"), images(4, 1), labels=[0, 1, 2, 3]), requests.label(0), task="diffusion")


# -- unlearning and folders --------------------------------------------------------------------------------------------
PLAN = Plan(
    Term(redirect("red -> plain")), Term(fit(), on="retain"), scope=component("cross_attention_kv"),
    optimizer=Optimizer("adam", lr=1e-3), epochs=2, epoch_of="forget", batch_size=4,
)  # fmt: skip


def test_only_the_named_weights_move_and_the_folder_is_an_ordinary_pipeline(tmp_path):
    from diffusers import StableDiffusionPipeline

    case = text_case(denoiser("text"))
    outcome = unlearn(case, PLAN, floor=None, run=tmp_path / "run")
    before, after = case.model.state_dict(), outcome.model.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {n for n in after if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    folder = tmp_path / "run" / "model"
    own = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert all(torch.equal(v, after[f"unet.{k}"]) for k, v in own.unet.state_dict().items())
    assert digest_weights(folder) == digest_weights(after) == outcome.record["weights"]["after"]
    again = unlearn(case, PLAN, floor=None, run=tmp_path / "run")  # read back
    assert all(torch.equal(v, after[k]) for k, v in again.model.state_dict().items())
    loaded = load_model(folder)
    assert isinstance(loaded, Denoiser) and all(torch.equal(v, after[k]) for k, v in loaded.state_dict().items())


def test_the_text_encoder_moves_only_where_a_scope_names_it():
    case = text_case(denoiser("text"))
    outcome = unlearn(case, PLAN.with_(scope=component("text_encoder")), floor=None)
    before = case.model.state_dict()
    moved = {name for name, value in outcome.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("text_encoder.") and "embeddings" not in name for name in moved)
    assert not any(p.requires_grad for p in outcome.model.text_encoder.parameters())
    outcome = unlearn(case, PLAN.with_(scope=None), floor=None)
    moved = {name for name, value in outcome.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("unet.") for name in moved)


def test_cross_attention_is_refused_where_there_is_none():
    with pytest.raises(BadSetting, match="a part 'cross_attention', found none"):
        unlearn(
            class_case(denoiser("class")),
            PLAN.with_(terms=(Term(relabel("noise")),), scope=component("cross_attention")),
        )


@pytest.mark.parametrize("name", [
    "unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.bin",
])  # fmt: skip
def test_a_pickle_in_a_pipeline_is_never_read(name, tmp_path):
    pipeline("text").save_pretrained(tmp_path / "pipe")
    pickled = tmp_path / "pipe" / name
    (file,) = pickled.parent.glob("*.safetensors")

    class Bomb:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save({"weight": Bomb()}, pickled)
    load_model(tmp_path / "pipe")  # whole weights are beside it
    file.unlink()
    with pytest.raises(BadModel, match="a pickle, which is never read"):
        load_model(tmp_path / "pipe")
    assert not (tmp_path / "ran").exists()


def test_an_eraser_that_needs_the_null_class_says_so_where_there_is_none():
    case = class_case(Denoiser(pipeline("class"), null=None))
    with pytest.raises(UnmetNeed, match=r"a model with a null class.*load it with null=id"):
        unlearn(case, "esd", floor=None, scope="all", steps=1, batch_size=2, sampling_steps=2)


def test_a_pipeline_that_cannot_be_served_is_refused_by_name(tmp_path):
    pipeline("class").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config | {"num_class_embeds": None}))
    with pytest.raises(BadModel, match="without class embeddings and without a text encoder|no usable"):
        load_pipeline(tmp_path)
    with pytest.raises(BadModel, match="one denoising network"):
        Denoiser(type("Pipe", (), {"components": {"unet": None, "scheduler": None}})())
