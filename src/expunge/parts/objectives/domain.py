"""Match the domain of two predictions, not each other: a discriminator cannot tell what the model says under one condition from
what a frozen original says under another.

With x_u = x(o(x_t, c*)) and x_a = x(o0(x_t, c)) the clean latents that the two predictions stand for at the same x_t (not the noises,
which are nearly the true one at small t), and D a discriminator whose label 0 means "what the original says",

    the discriminator's loss     BCE(D(x_a), 0) + BCE(D(x_u), 1)
    the model's                  BCE(D(x_u), 0)                       non-saturating (DoCo, 2405.15304)

    Plan(Term(deceive_domain("red -> plain"), on="forget"), adversary=domain_discriminator(Term(tell_domains("red -> plain"))), ...)
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import BadModel
from expunge.parts.objectives.base import Objective
from expunge.parts.objectives.redirect import OWN, first_token_still, says
from expunge.parts.plan import Optimizer, Term
from expunge.parts.players import Player, player
from expunge.parts.step import Step
from expunge.tasks.base import Batch, PerExample

NAME = "discriminator"
ORIGINAL, MODEL = 0.0, 1.0
"""The discriminator's labels: of what the frozen original says, and of what the model says."""


class PatchDiscriminator(nn.Module):
    """(B, C, S, S) -> a map (B, 1, s, s) of logits: 4x4 convolutions of stride 2, then one of stride 1 (PatchGAN, 1611.07004).

    Four of them as in DoCo's code, fewer where the last map would have no place: 64 -> 3x3, 8 -> 1x1.
    """

    def __init__(self, channels: int, size: int, width: int = 64, depth: int = 4):
        super().__init__()
        if size < 4:
            raise BadModel(f"expected latents of at least 4x4 for a patch discriminator, found {size}x{size}")
        depth = min(depth, int(math.log2(size)) - 1)
        layers: list[nn.Module] = []
        for number in range(depth):
            layers.append(nn.Conv2d(channels, width << number, 4, 2, 1))
            layers += [nn.BatchNorm2d(width << number)] if number else []
            layers.append(nn.LeakyReLU(0.2))
            channels = width << number
        self.body = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def logistic(logits: Tensor, label: float) -> PerExample:
    """(B,) binary cross-entropy in nats against one label, mean over the map (B, ...)."""
    wanted = torch.full_like(logits, label)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").flatten(1).mean(1)


@dataclass(frozen=True)
class Domains(Objective):
    """The pair of predictions. rule: the condition that the original is asked; source: a rule for what the model is asked instead
    of the row's own; still_first: no gradient through the first text position's keys and values."""

    rule: str
    source: str | None = None
    reference: str = "original"
    still_first: bool = False

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "output"),)

    def models(self, step: Step) -> Tensor:
        """x_u (B, C, H, W): the model's clean latents."""
        model: Any = step.networks["model"]
        task: Any = step.task
        asked = step.batch if self.source is None else task.conditioned(model, step.batch, self.source)
        with first_token_still(model) if self.still_first else nullcontext():
            return self._clean(step, asked, task.forward(model, asked))

    def originals(self, step: Step) -> Tensor:
        """x_a (B, C, H, W): the frozen original's, without gradient."""
        task: Any = step.task
        rule = self.rule
        asked = step.batch if rule == OWN else task.conditioned(step.networks["model"], step.batch, rule)
        return self._clean(step, asked, says(step, self.reference, asked))

    @staticmethod
    def _clean(step: Step, batch: Batch, output: Any) -> Tensor:
        model: Any = step.networks["model"]
        return model.to_clean(output.extra["noisy"], output.extra["timestep"], output.prediction)


@dataclass(frozen=True)
class DeceiveDomain(Domains):
    """BCE(D(x_u), 0)."""

    def __call__(self, step: Step) -> PerExample:
        return logistic(step.networks[NAME](self.models(step)), ORIGINAL)

    def __str__(self) -> str:
        return f"BCE(D(x), original({self.rule}))"


@dataclass(frozen=True)
class TellDomains(Domains):
    """BCE(D(x_a), 0) + BCE(D(x_u), 1)."""

    def __call__(self, step: Step) -> PerExample:
        with torch.no_grad():
            theirs, ours = self.originals(step), self.models(step)
        judge = step.networks[NAME]
        return logistic(judge(theirs), ORIGINAL) + logistic(judge(ours), MODEL)

    def __str__(self) -> str:
        return f"BCE(D: original({self.rule})|model)"


def deceive_domain(rule: str, source: str | None = None, still_first: bool = False) -> Objective:
    """The model's term: be taken for what the original says under `rule` (see `tasks.conditions`; "own": the row's own)."""
    return DeceiveDomain(rule, source, still_first=still_first)


def tell_domains(rule: str, source: str | None = None) -> Objective:
    """The discriminator's term."""
    return TellDomains(rule, source)


def domain_discriminator(term: Term, lr: float = 1e-4, warm_up: int = 0, width: int = 64) -> Player:
    """A patch discriminator as the player of a plan, for latents of the case's model; it plays after the model's update."""

    def build(case: Any, seed: int) -> nn.Module:
        channels, size, _ = case.model.shape
        return PatchDiscriminator(channels, size, width)

    move = Optimizer("adam", lr=lr, betas=(0.5, 0.999))
    return player(NAME, term, network=build, optimizer=move, warm_up=warm_up, after=True)
