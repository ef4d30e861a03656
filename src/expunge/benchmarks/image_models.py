"""The embedded generators: Stable Diffusion's own classes at toy size, trained on real digits and kept by content.

    pipe = text_toy(seed=0)                  # a StableDiffusionPipeline: "a red three" -> an 8x8 image
    pipe = text_toy(seed=0, exclude="red")   # `retrained`: no image and no caption of red (nor of crimson)
    pipe = class_toy(seed=0, exclude=3)      # a pipeline of UNet2DModel (10 classes and null id 10) and DDIM scheduler
    folder = toy_folder(TextToy(seed=0))     # an ordinary folder that DiffusionPipeline.from_pretrained loads
    pipe = small_text_toy()                  # seconds of training: for mechanisms, not for quality

Sizes and recipes are the testbed card's. The text toy works on pixels: its first stage is an AutoencoderKL whose weights
are set so that it is the identity (`identity_autoencoder`), so latents are images and the folder needs no code of ours.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.benchmarks.canvas import OBJECTS, STYLES, Canvas, digit_images, mini_canvas
from expunge.benchmarks.trained import cache_home
from expunge.errors import BadSetting, need_extra
from expunge.files import digest_bytes, write_atomic
from expunge.seeds import derive, generator

NULL = 10
"""The class toy's id for "no class": the unconditional branch of guidance."""
WORDS = (
    "a", "an", "the", "some", "of", "in", "on", "with", "and", "image", "picture", "photo", "drawing", "painting",
    "sketch", "style", "digit", "number", "figure", "object", "white", "black", "bright", "dark", "small", "large",
)  # fmt: skip
"""Words that no caption holds: for paraphrases, templates and attacks. Their embeddings stay at their first values."""


@dataclass(frozen=True)
class ClassToy:
    """The recipe of a class-conditional model; equal recipes on equal data share a folder.

    exclude: a digit left out of the training images. flow: velocity of a flow instead of `prediction`.
    """

    seed: int = 0
    exclude: int | None = None
    steps: int = 4000
    size: int = 8
    channels: tuple[int, ...] = (32, 64)
    flow: bool = False
    prediction: str = "epsilon"
    batch: int = 64
    lr: float = 2e-3
    drop: float = 0.1
    average: float = 0.995
    kind: str = "class"


@dataclass(frozen=True)
class TextToy:
    """The recipe of a text-to-image model. exclude: a word of a style, or an object, without images and captions.

    objects: "digits" or "cifar10".
    """

    seed: int = 0
    exclude: str | None = None
    steps: int = 2000
    size: int = 8
    channels: tuple[int, ...] = (32, 64)
    objects: str = "digits"
    prediction: str = "epsilon"
    batch: int = 64
    lr: float = 2e-3
    drop: float = 0.1
    width: int = 64
    length: int = 16
    kind: str = "text"

    def canvas(self) -> Canvas:
        canvas = mini_canvas("train", self.size, self.objects)
        return canvas if self.exclude is None else canvas.without(self.exclude)


Toy = ClassToy | TextToy
SMALL = {"steps": 400, "channels": (16, 32), "batch": 32}


def class_toy(seed: int = 0, exclude: int | None = None, cache: Path | None = None, **settings: Any) -> Any:
    """A DDPMPipeline holding unet (UNet2DModel with class labels) and scheduler; see ClassToy for settings."""
    return trained(ClassToy(seed=seed, exclude=exclude, **settings), cache)


def text_toy(seed: int = 0, exclude: str | None = None, cache: Path | None = None, **settings: Any) -> Any:
    """A StableDiffusionPipeline; see TextToy for settings."""
    return trained(TextToy(seed=seed, exclude=exclude, **settings), cache)


def small_class_toy(seed: int = 0, exclude: int | None = None, cache: Path | None = None, **settings: Any) -> Any:
    """For tests: narrow and short-trained; its digits are blurry."""
    return class_toy(seed, exclude, cache, **{**SMALL, **settings})


def small_text_toy(seed: int = 0, exclude: str | None = None, cache: Path | None = None, **settings: Any) -> Any:
    """For tests: narrow and short-trained; it knows the styles and not the digits."""
    return text_toy(seed, exclude, cache, **{**SMALL, **settings})


def trained(toy: Toy, cache: Path | None = None) -> Any:
    """The toy's pipeline, a fresh object each time: it may be changed."""
    return load(toy_folder(toy, cache))


def load(folder: Path) -> Any:
    """A pipeline from a local folder, quiet and in eval mode."""
    pipeline = need_extra("diffusers", "generation").DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def toy_folder(toy: Toy, cache: Path | None = None, device: str | None = None) -> Path:
    """The toy's pipeline folder, trained first when it is not there; one process trains, others wait for it.

    device: where to train; by default the accelerator when there is one. cache: default `cache_home()`.
    """
    images = digit_images("train", toy.size, toy.exclude)[0] if isinstance(toy, ClassToy) else toy.canvas().images
    data = digest_bytes(images.numpy().tobytes())
    key = digest_bytes(json.dumps([asdict(toy), data], sort_keys=True))[:16]
    folder = Path(cache or cache_home()) / "generation" / f"{toy.kind}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            start = time.perf_counter()
            pipeline, loss = (train_class if isinstance(toy, ClassToy) else train_text)(toy, device)
            facts = {"toy": asdict(toy), "data": data, "loss": loss, "device": device}
            with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
                pipeline.save_pretrained(f"{aside}/whole")
                facts["seconds"] = round(time.perf_counter() - start, 1)
                write_atomic(f"{aside}/whole/training.json", json.dumps(facts, indent=1))
                shutil.move(f"{aside}/whole", folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def tokenizer(length: int = 16) -> Any:
    """A CLIPTokenizer from two files written on the spot: start 0, end and padding 1, each word of ours one token.

    Single letters are there too, so any other word becomes several tokens.
    """
    transformers = need_extra("transformers", "generation")
    ours = [
        *WORDS,
        *(word for words in STYLES.values() for word in words),
        *(w for names in OBJECTS.values() for w in names),
    ]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(ours):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:  # what earlier words' merges make of it comes first, as in the tokenizer
            parts = _merged(parts, pair)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = _merged(parts, merges[-1])
            vocabulary.append(parts[0])
    with tempfile.TemporaryDirectory() as folder:
        write_atomic(f"{folder}/vocab.json", json.dumps({t: i for i, t in enumerate(dict.fromkeys(vocabulary))}))
        write_atomic(f"{folder}/merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """A word's parts after one merge, from left to right."""
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return found


def identity_autoencoder(size: int) -> Any:
    """An AutoencoderKL of images (N, 3, S, S) in [-1, 1] that returns them, to about 1e-5.

    Eight channels: x, -x, and the constants A and -A. Residual branches are zero. The last group norm then divides by
    A sqrt(2 / 8) to within (x / A)^2, its weight multiplies this back, and silu(x) - silu(-x) = x undoes the activation.
    """
    width, constant = 8, 1000.0
    with _seeded(0):  # every weight is set below, and the global generator left as it was
        autoencoder = need_extra("diffusers", "generation").AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=3, block_out_channels=(width,), norm_num_groups=1,
            layers_per_block=1, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
            scaling_factor=1.0, force_upcast=False, use_quant_conv=False, use_post_quant_conv=False,
            mid_block_add_attention=False, sample_size=size,
        )  # fmt: skip
    with torch.no_grad():
        for name, weight in autoencoder.named_parameters():
            if "conv" in name and "norm" not in name:
                weight.zero_()
        for half in (autoencoder.encoder, autoencoder.decoder):
            for channel in range(3):
                half.conv_in.weight[channel, channel, 1, 1] = 1
                half.conv_in.weight[channel + 3, channel, 1, 1] = -1
                half.conv_out.weight[channel, channel, 1, 1] = 1
                half.conv_out.weight[channel, channel + 3, 1, 1] = -1
            half.conv_in.bias[6], half.conv_in.bias[7] = constant, -constant
            half.conv_norm_out.weight.fill_(constant * (2 / width) ** 0.5)
        autoencoder.encoder.conv_out.bias[3:] = -30  # log variance: a draw from the posterior is its mean
    return autoencoder.eval().requires_grad_(False)


def build_class(toy: ClassToy) -> tuple[Any, Any]:
    """(untrained UNet2DModel, scheduler): attention on the last level alone."""
    diffusers = need_extra("diffusers", "generation")
    plain = len(toy.channels) - 1
    unet = diffusers.UNet2DModel(
        sample_size=toy.size, in_channels=1, out_channels=1, num_class_embeds=NULL + 1, block_out_channels=toy.channels,
        layers_per_block=1, down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain, norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    if toy.flow:
        return unet, diffusers.FlowMatchEulerDiscreteScheduler()
    return unet, diffusers.DDIMScheduler(clip_sample=False, prediction_type=toy.prediction)


def build_text(toy: TextToy) -> tuple[Any, Any, Any, Any]:
    """(tokenizer, untrained CLIPTextModel, untrained UNet2DConditionModel, Stable Diffusion's DDIM scheduler).

    At 8x8 the UNet looks at the text on its first level, as the card's; else on the levels of 16x16 at most.
    """
    diffusers, transformers = need_extra("diffusers", "generation"), need_extra("transformers", "generation")
    words = tokenizer(toy.length)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=toy.width, intermediate_size=2 * toy.width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=toy.length, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))  # fmt: skip
    with torch.no_grad():  # at CLIP's own 0.02 styles are learned and digits stay at chance (card's measurement)
        encoder.get_input_embeddings().weight.normal_(0, 1)
    looks = [toy.size >> level <= (16 if toy.size > 16 else 8) for level in range(len(toy.channels))]
    looks = [True] + [False] * (len(looks) - 1) if toy.size == 8 else looks
    unet = diffusers.UNet2DConditionModel(
        sample_size=toy.size, in_channels=3, out_channels=3, cross_attention_dim=toy.width,
        block_out_channels=toy.channels, layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if look else "DownBlock2D" for look in looks),
        up_block_types=tuple("CrossAttnUpBlock2D" if look else "UpBlock2D" for look in reversed(looks)),
        norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False,
        clip_sample=False, prediction_type=toy.prediction,
    )  # fmt: skip
    return words, encoder, unet, scheduler


def noised(scheduler: Any, images: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, target) for a batch: noise and timesteps from `draws` (on the CPU), the scheduler's own prediction type."""
    noise = torch.randn(images.shape, generator=draws).to(images.device)
    if not hasattr(scheduler, "get_velocity"):  # a flow: x = (1 - s) x0 + s e, velocity e - x0, time 1000 s
        share = torch.rand(len(images), generator=draws).to(images.device)
        mix = share[:, None, None, None]
        return (1 - mix) * images + mix * noise, 1000 * share, noise - images
    t = torch.randint(scheduler.config.num_train_timesteps, (len(images),), generator=draws).to(images.device)
    targets = {
        "epsilon": lambda: noise, "sample": lambda: images,
        "v_prediction": lambda: scheduler.get_velocity(images, noise, t),
    }  # fmt: skip
    kind = scheduler.config.prediction_type
    if kind not in targets:
        raise BadSetting(f"expected a prediction type of {', '.join(targets)}, found '{kind}'")
    return scheduler.add_noise(images, noise, t), t, targets[kind]()


def train_class(toy: ClassToy, device: str) -> tuple[Any, float]:
    """(pipeline on the CPU, mean loss of the last hundred steps): AdamW with cosine, labels dropped, weights averaged."""
    images, labels = (part.to(device) for part in digit_images("train", toy.size, toy.exclude))
    with _seeded(toy.seed):
        unet, scheduler = build_class(toy)
    average = torch.optim.swa_utils.AveragedModel(
        unet.to(device), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(toy.average)
    )

    def loss(draws: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (toy.batch,), generator=draws).to(device)
        kept = (torch.rand(toy.batch, generator=draws) >= toy.drop).to(device)
        x, t, target = noised(scheduler, images[rows], draws)
        return F.mse_loss(unet(x, t, class_labels=torch.where(kept, labels[rows], NULL)).sample, target)

    last = _descend(toy, [unet], loss, after=lambda: average.update_parameters(unet))
    unet = average.module.cpu().eval()
    return need_extra("diffusers", "generation").DDPMPipeline(unet=unet, scheduler=scheduler), last


def train_text(toy: TextToy, device: str) -> tuple[Any, float]:
    """(pipeline on the CPU, mean loss of the last hundred steps): text encoder and UNet together, captions dropped to ""."""
    canvas = toy.canvas()
    with _seeded(toy.seed):
        words, encoder, unet, scheduler = build_text(toy)
    encoder, unet = encoder.to(device), unet.to(device)
    images, styles, objects = canvas.images.to(device), canvas.styles, canvas.objects
    cells = canvas.cells()
    place = torch.full((len(canvas.style_names), len(canvas.object_names)), -1)
    for number, cell in enumerate(cells):
        place[cell] = 2 * number
    texts = [*canvas.captions(), ""]
    ids = words(texts, padding="max_length", max_length=toy.length, truncation=True, return_tensors="pt").input_ids

    def loss(draws: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (toy.batch,), generator=draws)
        captions = place[styles[rows], objects[rows]] + torch.randint(2, (toy.batch,), generator=draws)
        captions[torch.rand(toy.batch, generator=draws) < toy.drop] = len(texts) - 1
        x, t, target = noised(scheduler, images[rows.to(device)], draws)
        text = encoder(ids[captions].to(device))[0]
        return F.mse_loss(unet(x, t, encoder_hidden_states=text).sample, target)

    last = _descend(toy, [encoder, unet], loss)
    pipeline = need_extra("diffusers", "generation").StableDiffusionPipeline(
        identity_autoencoder(toy.size), encoder.cpu().eval(), words, unet.cpu().eval(), scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipeline, last


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial weights from `seed`, the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "toy", "weights"))
        yield


def _descend(toy: Toy, models: list[Any], loss: Any, after: Any = lambda: None) -> float:
    """The mean loss of the last hundred steps of AdamW with a cosine; every step's draws come from (seed, step)."""
    weights = [weight for model in models for weight in model.train().parameters()]
    optimizer = torch.optim.AdamW(weights, lr=toy.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, toy.steps)
    recent: list[Tensor] = []
    for step in range(toy.steps):
        value = loss(generator(toy.seed, "toy", step))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        after()
        recent = [*recent[-99:], value.detach()]
    return float(torch.stack(recent).mean())


def main() -> None:
    """train: into the cache, and print the folder. judge: print the judged accuracy of its images too."""
    parser = argparse.ArgumentParser(
        description="train an embedded generator into the cache, print its folder, judge it"
    )
    parser.add_argument("command", choices=["train", "judge"])
    parser.add_argument("--toy", choices=["class", "text"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exclude", help="a digit (class), a word of a style or an object (text)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--channels", type=lambda text: tuple(int(part) for part in text.split(",")))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--prediction", choices=["epsilon", "v_prediction", "sample"])
    parser.add_argument("--objects", choices=list(OBJECTS), help="text toy only")
    parser.add_argument("--flow", action="store_true", help="class toy only: a flow's velocity")
    parser.add_argument("--small", action="store_true", help="the tests' size")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--device")
    given = vars(parser.parse_args())
    kind, cache, device, small = (given.pop(name) for name in ("toy", "cache", "device", "small"))
    command = given.pop("command")
    torch.set_num_threads(1)
    settings = {name: value for name, value in given.items() if value not in (None, False)}
    if small:
        settings = {**SMALL, **settings}
    if kind == "class" and "exclude" in settings:
        settings["exclude"] = int(settings["exclude"])
    toy: Toy = ClassToy(**settings) if kind == "class" else TextToy(**settings)
    folder = toy_folder(toy, cache, device)
    print(folder, (folder / "training.json").read_text(), sep="\n")
    if command == "judge":
        from expunge.benchmarks.canvas_judges import canvas_judges, digit_judges, quality
        from expunge.cases.loading import load_pipeline

        if kind == "class":
            judges, names = digit_judges(toy.size, cache), ("digit",)
        else:
            judges, names = canvas_judges(toy.size, toy.objects, folder=cache), ("style", "object")
        print(
            *(getattr(judges, name) for name in names),
            quality(load_pipeline(folder), judges, without=toy.exclude),
            sep="\n",
        )
