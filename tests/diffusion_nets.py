"""Tiny untrained diffusion models: real diffusers and transformers classes, for tests of mechanisms."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from expunge.benchmarks.image_models import ClassToy, TextToy, build_class, build_text, identity_autoencoder
from expunge.tasks.denoiser import Denoiser

SIZE = {"channels": (8, 16), "steps": 1}


def pipeline(kind: str, **settings: Any) -> Any:
    """An untrained pipeline; settings: of the toy (prediction, flow, seed)."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(settings.get("seed", 0))
        if kind == "class":
            unet, scheduler = build_class(ClassToy(**SIZE, **settings))
            return diffusers.DDPMPipeline(unet=unet.eval(), scheduler=scheduler)
        words, encoder, unet, scheduler = build_text(TextToy(**SIZE, **settings))
    made = diffusers.StableDiffusionPipeline(
        identity_autoencoder(8), encoder.eval(), words, unet.eval(), scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def denoiser(kind: str, **settings: Any) -> Denoiser:
    return Denoiser(pipeline(kind, **settings)).eval()


@cache
def shared(kind: str) -> Denoiser:
    """One that nobody changes."""
    return denoiser(kind)
