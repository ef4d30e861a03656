"""A one-step generator: the networks of a pipeline, called once, from noise alone.

With a and b of the schedule at the timestep `start` (sigma = b / a = 2.5 in Score Forgetting Distillation),

    z ~ N(0, 1),   u = b z,   G(z, c) = x(o(u, start, c))          the clean latents that the network's output stands for

There is no signal in u and no guidance: `sample` sees `draw` and asks for that. On disk it is an ordinary pipeline folder with one
more file, one_step.json; diffusers loads it as the pipeline it is made of, `expunge.load_model` as the generator.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.errors import BadModel
from expunge.files import write_atomic
from expunge.tasks.denoiser import Denoiser

FORMAT = "expunge.one_step/1"
FILE = "one_step.json"


class OneStep(Denoiser):
    """start: the timestep at which the network is asked. Same class of networks and state-dict keys as its `Denoiser`'s."""

    def __init__(self, pipeline: Any, null: int | str | None = "last", start: int = 0):
        super().__init__(pipeline, null)
        self.start = start

    @classmethod
    def around(cls, model: Denoiser, start: int) -> OneStep:
        """A generator on the very networks of a denoiser (not copied), in the mode they are in."""
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        made = cls(model.pipeline(), model.null_given, start)
        for name, p in made.named_parameters():
            p.requires_grad_(flags[name])
        made.training = model.training
        return made

    def draw(self, noise: Tensor, encoded: Tensor) -> Tensor:
        """G(z, c), (B, C, H, W) clean latents of standard normal noise and encoded conditions; differentiable."""
        at = torch.full((len(noise),), self.start, device=noise.device)
        _, b = self.levels(at, noise)
        given = b * noise
        return self.to_clean(given, at, self(given, at, encoded))

    def save_pretrained(self, folder: Any, **_: Any) -> None:
        super().save_pretrained(folder)
        write_atomic(Path(folder) / FILE, json.dumps({"format": FORMAT, "start": self.start}))


def saved_start(folder: Path) -> int | None:
    """The timestep of the generator saved in a folder; None: what is there is no generator."""
    file = folder / FILE
    if not file.exists():
        return None
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if about["format"] == FORMAT:
            return int(about["start"])
        found: Any = about["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = error
    raise BadModel(f"expected {FILE} of the format {FORMAT}, found {found}; save the generator again")


def timestep_of(model: Denoiser, sigma: float) -> int:
    """The training timestep whose noise is `sigma` times its signal (b / a), the nearest there is."""
    last = model.horizon - 1 + int(model.flow)
    every = torch.arange(int(model.flow), last + 1)
    a, b = model.levels(every, torch.zeros(len(every), 1, 1, 1))
    ratio = (b / a.clamp_min(1e-12)).flatten()
    return int(every[(ratio.log() - torch.tensor(sigma).log()).abs().argmin()])


def timesteps_of(model: Denoiser, sigmas: Iterable[float]) -> tuple[int, ...]:
    """`timestep_of` for each."""
    return tuple(timestep_of(model, sigma) for sigma in sigmas)
