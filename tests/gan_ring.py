"""A GAN that trains in seconds: four Gaussians on a circle, of which one is to go. Its judge is exact: the nearest centre."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import nn

from expunge import Case, Optimizer, Training, requests
from expunge.cases.feedback import feedback
from expunge.engine import fit
from expunge.parts.adversaries import moving_average
from expunge.parts.objectives.adversarial import deceive, discriminator
from expunge.tasks.gan import Gan, GanPair

MODES, FORGET, SPREAD = 4, 3, 0.1
ANGLES = torch.arange(MODES) * 2 * math.pi / MODES
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def ring(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 2) points and the mode of each."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % MODES
    return CENTRES[labels] + SPREAD * torch.randn(rows, 2, generator=draws), labels


def judge(points: torch.Tensor) -> torch.Tensor:
    """(N,) the nearest centre."""
    return torch.cdist(points, CENTRES).argmin(1)


def chances(points: torch.Tensor) -> torch.Tensor:
    """(N, 4) probabilities of the modes under the true mixture: another judge of the same answer."""
    return (-torch.cdist(points, CENTRES).square() / (2 * SPREAD**2)).softmax(1)


def mlp(inside: int, outside: int, width: int = 32) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inside, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, outside),
    )


class RingGenerator(nn.Module):
    latent = 4

    def __init__(self):
        super().__init__()
        self.convs = mlp(self.latent, 2)  # the name under which a style generator has what the Fisher penalty holds

    def forward(self, z):
        return self.convs(z)


def build() -> GanPair:
    return GanPair(RingGenerator(), mlp(2, 1))


RECIPE = Training(
    epochs=80, batch_size=64, optimizer=Optimizer("adam", lr=2e-3, betas=(0.0, 0.99)), objective=deceive(),
    adversary=discriminator(lr=2e-3, penalty=1.0), average=moving_average(half_life=50),
)  # fmt: skip


@cache
def real_case(seed: int = 0) -> Case:
    """The trained pair with its training data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pair = build()
    x, y = ring(512, 0)
    case = Case(
        pair, (x, y), requests.label(FORGET), test=ring(256, 1), task=Gan(), recipe=RECIPE, build=build, name="ring"
    )
    return case.with_(model=fit(case, "train", seed))


@cache
def ring_case(seed: int = 0) -> Case:
    """The same pair with its own judged samples: what data-free methods get."""
    return feedback(real_case(seed).model, judge, FORGET, samples=800, recipe=RECIPE, build=build, name="ring")


@cache
def retrained(seed: int = 1) -> nn.Module:
    return fit(real_case(), "retain", seed)


def shares(model: nn.Module, count: int = 2000, seed: int = 5) -> torch.Tensor:
    """(4,) how the model's samples spread over the modes."""
    return torch.bincount(judge(Gan().sample(model, count, seed)), minlength=MODES) / count
