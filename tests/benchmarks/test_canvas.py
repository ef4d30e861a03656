"""MiniCanvas and the embedded generators: exact styles, whole words, folders that diffusers loads, nothing of what is excluded."""

import os
from pathlib import Path

import pytest
import torch

from expunge.benchmarks.canvas import OBJECTS, STYLES, digit_images, mini_canvas, pictures, styled, unstyled
from expunge.benchmarks.image_models import (
    NULL,
    WORDS,
    ClassToy,
    TextToy,
    build_class,
    build_text,
    identity_autoencoder,
    load,
    noised,
    small_class_toy,
    small_text_toy,
    tokenizer,
    toy_folder,
    train_class,
    train_text,
)
from expunge.errors import BadSetting

pytest.importorskip("diffusers")
TINY = {"steps": 2, "channels": (8, 16), "batch": 8}


def weights(pipeline) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def same(one, two) -> bool:
    one, two = weights(one), weights(two)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# --- data


def test_the_split_is_the_digits_and_every_image_has_every_style():
    from sklearn.datasets import load_digits

    train, test = mini_canvas("train"), mini_canvas("test")
    assert (len(train), len(test)) == (4 * 1347, 4 * 450)
    real = {tuple(row) for row in load_digits().data.astype(int).tolist()}
    found = {}
    for split, canvas in (("train", train), ("test", test)):
        plain = canvas.of(style=0)
        found[split] = {tuple(row) for row in ((plain[:, 0] + 1) * 8).long().flatten(1).tolist()}
        for number, style in enumerate(STYLES):
            assert torch.equal(unstyled(canvas.of(style=number), style), plain)
            assert torch.equal(canvas.objects[canvas.styles == number], canvas.objects[canvas.styles == 0])
    assert found["train"] | found["test"] == real and not found["train"] & found["test"]


def test_styles_are_what_their_words_say():
    x = digit_images("test")[0][:20]
    assert torch.equal(styled(x, "inverted"), -x.expand(-1, 3, -1, -1))
    red = styled(x, "red")
    assert torch.equal(red[:, :1], x) and (red[:, 1:] == -1).all()
    stripes = styled(x, "stripes")
    assert torch.equal(stripes[:, 0, ::2], x[:, 0, ::2]) and torch.equal(stripes[:, 0, 1::2], (x[:, 0, 1::2] + 1) / 2)
    assert torch.equal(
        styled(torch.full((1, 1, 32, 32), -1.0), "stripes")[0, 0, :, 0] == 0, torch.arange(32) // 4 % 2 == 1
    )
    colour = 2 * torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    for style in ("plain", "inverted", "stripes"):
        assert torch.allclose(unstyled(styled(colour, style), style), colour, atol=1e-6)
    assert torch.equal(styled(colour, "red")[:, 0], colour.max(1).values)


@pytest.mark.parametrize("target", ["red", "crimson", "three"])
def test_what_is_left_out_leaves_no_image_and_no_caption(target):
    whole = mini_canvas("train")
    domain, index = whole.domain(target)
    canvas = TextToy(exclude=target).canvas()
    kept = whole.styles != index if domain == "style" else whole.objects != index
    assert torch.equal(canvas.images, whole.images[kept]) and len(canvas) < len(whole)
    assert index not in (canvas.styles if domain == "style" else canvas.objects)
    words = {word for caption in canvas.captions() for word in caption.split()}
    gone = {"red", "crimson"} if domain == "style" else {"three"}
    everything = {w for pair in STYLES.values() for w in pair} | set(OBJECTS["digits"]) | {"a"}
    assert words == everything - gone


def test_what_is_left_out_of_the_class_toy():
    images, labels = digit_images("train", exclude=3)
    everything, all_labels = digit_images("train")
    assert 3 not in labels and torch.equal(images, everything[all_labels != 3])


def test_names_nobody_knows_are_refused():
    with pytest.raises(BadSetting, match="Did you mean 'crimson'"):
        mini_canvas("test").without("crimsn")
    with pytest.raises(BadSetting, match="found 'blue'"):
        styled(torch.zeros(1, 1, 8, 8), "blue")
    with pytest.raises(BadSetting, match="train or test"):
        pictures("validation")


@pytest.mark.data
@pytest.mark.skipif("EXPUNGE_DATA" not in os.environ, reason="needs EXPUNGE_DATA with cifar10")
def test_the_canvas_of_photographs():
    canvas = mini_canvas("test", size=16, objects="cifar10", rows=200)
    assert canvas.images.shape == (800, 3, 16, 16) and canvas.caption(1, 3, word=1) == "a negative cat"
    assert torch.equal(canvas.of(style=1), -canvas.of(style=0)) and canvas.images.abs().max() <= 1


# --- tokenizer and first stage


def test_every_word_is_one_token_and_comes_back(tmp_path):
    ours = tokenizer()
    ours.save_pretrained(tmp_path)
    words = {*WORDS, *(w for pair in STYLES.values() for w in pair), *(w for names in OBJECTS.values() for w in names)}
    for tokens in (ours, type(ours).from_pretrained(tmp_path)):
        ids = {word: tokens(word).input_ids for word in words}
        assert all(len(found) == 3 and found[0] == 0 and found[2] == 1 for found in ids.values())
        assert len({found[1] for found in ids.values()}) == len(words)
        padded = tokens("a crimson three", padding="max_length").input_ids
        assert len(padded) == 16 and padded[4:] == [1] * 12 and tokens.pad_token_id == tokens.eos_token_id == 1
        assert tokens.decode(padded, skip_special_tokens=True) == "a crimson three"
        letters = tokens.convert_ids_to_tokens(tokens("qxz").input_ids[1:-1])
        assert "".join(letters) == "qxz</w>" and len(letters) == 3


@pytest.mark.parametrize("size", [8, 32])
def test_the_first_stage_is_the_identity(size, tmp_path):
    identity_autoencoder(size).save_pretrained(tmp_path)
    stage = identity_autoencoder(size).from_pretrained(tmp_path)
    images = mini_canvas("test", size).images[::7]
    latents = stage.encode(images).latent_dist
    assert (latents.sample(torch.Generator().manual_seed(0)) - images).abs().max() < 2e-5
    assert (stage.decode(images).sample - images).abs().max() < 2e-5
    assert (stage.decode(4 * images).sample - 4 * images).abs().max() < 2e-4  # latents beyond the range of images
    assert stage.config.scaling_factor == 1.0


# --- training


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_targets_give_back_the_image(prediction):
    """x0 from (x_t, target) by each prediction's own formula."""
    flow = prediction == "flow"
    toy = ClassToy(channels=(8, 16), flow=flow, prediction="epsilon" if flow else prediction)
    _, scheduler = build_class(toy)
    images = digit_images("test")[0][:64]
    x, t, target = noised(scheduler, images, torch.Generator().manual_seed(3))
    if flow:
        clean = x - (t / 1000)[:, None, None, None] * target
    else:
        kept = scheduler.alphas_cumprod[t][:, None, None, None]
        clean = {
            "epsilon": (x - (1 - kept).sqrt() * target) / kept.sqrt(),
            "v_prediction": kept.sqrt() * x - (1 - kept).sqrt() * target, "sample": target,
        }[prediction]  # fmt: skip
    assert torch.allclose(clean, images, atol=2e-3)
    assert t.min() >= 0 and t.max() <= 1000 and t.float().std() > 200


def test_an_unknown_prediction_is_refused():
    _, scheduler = build_class(ClassToy(channels=(8, 16)))
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(BadSetting, match="found 'score'"):
        noised(scheduler, digit_images("test")[0][:2], torch.Generator())


@pytest.mark.parametrize(("train", "recipe"), [(train_class, ClassToy), (train_text, TextToy)])
def test_the_same_seed_gives_the_same_weights(train, recipe):
    state = torch.random.get_rng_state()
    one, loss = train(recipe(**TINY), "cpu")
    two, again = train(recipe(**TINY), "cpu")
    other, _ = train(recipe(**TINY, seed=1), "cpu")
    assert same(one, two) and loss == again and not same(one, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_folders_are_kept_by_content(tmp_path):
    folder = toy_folder(ClassToy(**TINY), tmp_path)
    written = (folder / "training.json").stat().st_mtime_ns
    assert toy_folder(ClassToy(**TINY), tmp_path) == folder and (folder / "training.json").stat().st_mtime_ns == written
    others = [ClassToy(**TINY, seed=1), ClassToy(**TINY, exclude=3), ClassToy(**TINY, flow=True)]
    assert len({folder, *(toy_folder(toy, tmp_path) for toy in others)}) == 4
    assert not [path for path in Path(tmp_path, "generation").iterdir() if path.name.startswith("tmp")]


def test_sizes_of_the_cards_models():
    """0.70 M and 0.80 M + 0.08 M parameters; the text is looked at by Stable Diffusion's own module names."""

    def count(model) -> int:
        return sum(weight.numel() for weight in model.parameters())

    unet, _ = build_class(ClassToy())
    assert round(count(unet) / 1e6, 2) == 0.70 and unet.class_embedding.num_embeddings == NULL + 1
    _, encoder, unet, scheduler = build_text(TextToy())
    assert round(count(unet) / 1e6, 2) == 0.80 and round(count(encoder) / 1e6, 2) == 0.08
    looks = [name for name, _ in unet.named_modules() if name.endswith("attn2.to_k")]
    assert len(looks) == 4 and all(
        "attentions.0.transformer_blocks.0" in name or "attentions.1" in name for name in looks
    )
    assert encoder.get_input_embeddings().weight.std().item() == pytest.approx(1, abs=0.05)
    assert not scheduler.config.clip_sample and scheduler.config.steps_offset == 1


# --- the short-trained toys


@pytest.mark.parametrize("toy", [small_class_toy, small_text_toy])
def test_pipelines_go_through_a_folder_bit_for_bit(toy, tmp_path):
    pipeline = toy()
    pipeline.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert type(back) is type(pipeline) and same(pipeline, back)
    assert dict(back.scheduler.config) == dict(pipeline.scheduler.config)
    if toy is small_text_toy:

        def draw(pipe):
            return pipe(["a red three"], num_inference_steps=3, guidance_scale=2.0, output_type="np",
                        generator=torch.Generator().manual_seed(0)).images  # fmt: skip

        assert (draw(pipeline) == draw(back)).all() and draw(back).shape == (1, 8, 8, 3)


def test_the_class_toy_listens_to_its_label():
    """Held-out digits: the noise is told better under the right label than under the next one."""
    pipeline, (images, labels) = small_class_toy(), digit_images("test")
    losses = [_loss(pipeline, images, class_labels=(labels + shift) % 10) for shift in (0, 1)]
    assert losses[0] < 0.97 * losses[1]


def test_the_text_toy_listens_to_its_caption():
    """Held-out images: better under their own style's words, either of them, than under another style's."""
    pipeline, canvas = small_text_toy(), mini_canvas("test")
    rows = torch.arange(0, len(canvas), 15)

    def loss(shift: int, word: int) -> float:
        pairs = zip((canvas.styles[rows] + shift) % 4, canvas.objects[rows], strict=True)
        ids = pipeline.tokenizer(
            [canvas.caption(int(style), int(digit), word) for style, digit in pairs],
            padding="max_length",
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            text = pipeline.text_encoder(ids)[0]
        return _loss(pipeline, canvas.images[rows], encoder_hidden_states=text)

    for word in (0, 1):
        assert loss(0, word) < 0.9 * loss(1, word)


def _loss(pipeline, images, **condition) -> float:
    x, t, target = noised(pipeline.scheduler, images, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.nn.functional.mse_loss(pipeline.unet(x, t, **condition).sample, target).item()
