"""Untrained diffusion pipelines of a few thousand weights, in a blink: for equations, not for pictures."""

from __future__ import annotations

import torch

from expunge import Case, pictures, requests
from expunge.benchmarks.canvas import digit_images, mini_canvas
from expunge.benchmarks.image_models import ClassToy, TextToy, build_class, build_text, identity_autoencoder
from expunge.tasks.denoiser import Denoiser

SMALL = (8, 16)


def tiny_class(**settings) -> Denoiser:
    """Ten classes and a null one, on 1x8x8."""
    from diffusers import DDPMPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, scheduler = build_class(ClassToy(channels=SMALL, **settings))
    return Denoiser(DDPMPipeline(unet=unet, scheduler=scheduler)).eval()


def tiny_text() -> Denoiser:
    """Prompts, on 3x8x8."""
    from diffusers import StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words, encoder, unet, scheduler = build_text(TextToy(channels=SMALL))
    return Denoiser(
        StableDiffusionPipeline(
            identity_autoencoder(8),
            encoder.eval(),
            words,
            unet,
            scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    ).eval()


def class_case(model: Denoiser | None = None, rows: int = 40, forget: int = 3) -> Case:
    model = tiny_class() if model is None else model
    images, labels = digit_images("train")
    return Case(model, pictures(model, images[:rows], labels=labels[:rows]), requests.label(forget), task="diffusion")


def text_case(model: Denoiser | None = None, style: int = 2) -> Case:
    """Every style and object once; the red ones are to go."""
    model = tiny_text() if model is None else model
    canvas = mini_canvas("train")
    rows = [((canvas.styles == s) & (canvas.objects == o)).nonzero()[0, 0] for s, o in canvas.cells()]
    styles, objects = canvas.styles[rows], canvas.objects[rows]
    captions = [canvas.caption(int(s), int(o)) for s, o in zip(styles, objects, strict=True)]
    table = pictures(model, canvas.images[rows], prompts=captions, style=styles, object=objects)
    return Case(model, table, requests.where("style", "==", style), task="diffusion")
