"""Distil a diffusion model into a one-step generator by scores: SiD's two losses, across conditions.

G draws x = G(z, c); x_t = a x + b e at t between two noise levels. The teacher phi is frozen, the fake score psi is a player that learns
to denoise what G draws. With clean predictions f at x_t,

    psi:  || o_psi(x_t, t, c) - target ||^2                                     x not differentiated
    G:    (f_phi - f_psi) . ( (f_phi - x) - alpha (f_phi - f_psi) ) / omega      omega = mean |f_phi - x|, a number

both summed over an image's values. Gradients of the second reach G through x in both networks' inputs (their weights hold still).
f_phi may be asked another condition than f_psi: then what G draws for c is pulled to what the teacher draws for that one.
SiD: Zhou et al., 2404.04057; across conditions: Score Forgetting Distillation, 2409.11219.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.parts.objectives.base import Objective
from expunge.parts.plan import Optimizer, Term
from expunge.parts.players import Player, player
from expunge.parts.step import Step
from expunge.tasks.base import PerExample
from expunge.tasks.one_step import timesteps_of

FAKE = "fake_score"


@dataclass(frozen=True)
class Scored(Objective):
    """sigmas: the noise-to-signal ratios between which t is drawn. guidance: of both scores, diffusers' convention."""

    sigmas: tuple[float, float] = (0.137, 13.1)
    guidance: float = 1.0

    def drawn(self, step: Step) -> Tensor:
        """x (B, C, H, W): what the generator draws for the batch's conditions, from noise of this step."""
        generator: Any = step.networks["model"]
        task: Any = step.task
        noise = torch.randn((len(step.batch), *generator.shape), generator=step.rng).to(generator.device)
        return generator.draw(noise, generator.encode(task.condition(step.batch)))

    def noised(self, step: Step, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, e)."""
        model: Any = step.networks["model"]
        low, high = timesteps_of(model, self.sigmas)
        t = torch.randint(low, high + 1, (len(x),), generator=step.rng).to(x.device)
        e = torch.randn(x.shape, generator=step.rng).to(x)
        return model.noised(x, e, t), t, e

    def said(self, model: Any, noisy: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """A score network's output under guidance."""
        none = None if self.guidance == 1.0 else model.encode(model.conditions.like(condition))
        return model.guided(noisy, t, model.encode(condition), none, self.guidance, {}).float()


@dataclass(frozen=True)
class FakeScore(Scored):
    """The player's term: `step.model` is the fake score."""

    def __call__(self, step: Step) -> PerExample:
        model, task = step.model, step.task
        with torch.no_grad():
            x = self.drawn(step)
        noisy, t, e = self.noised(step, x)
        output = self.said(model, noisy, t, task.condition(step.batch))  # type: ignore[attr-defined]
        return (output - model.target(x, e, t)).square().flatten(1).sum(1)  # type: ignore[operator]

    def __str__(self) -> str:
        return "error on G(z)"


@dataclass(frozen=True)
class ScoreDistance(Scored):
    """The generator's term. rule: the condition that the teacher is asked instead of the row's own."""

    rule: str | None = None
    alpha: float = 1.2
    reads = (("original", "features"),)

    def __call__(self, step: Step) -> PerExample:
        task: Any = step.task
        teacher, fake = step.references.model("original"), step.networks[FAKE]
        own = task.condition(step.batch).to(fake.device)
        other = own if self.rule is None else fake.conditions.replaced(own, self.rule)  # type: ignore[union-attr, operator]
        x = self.drawn(step)
        noisy, t, _ = self.noised(step, x)
        f_phi = teacher.to_clean(noisy, t, self.said(teacher, noisy, t, other))  # type: ignore[operator]
        f_psi = fake.to_clean(noisy, t, self.said(fake, noisy, t, own))  # type: ignore[operator]
        return score_loss(x, f_phi, f_psi, self.alpha)

    def __str__(self) -> str:
        return f"score(original{'' if self.rule is None else f'({self.rule})'}‖G, α={self.alpha:g})"


def score_loss(x: Tensor, f_phi: Tensor, f_psi: Tensor, alpha: float) -> PerExample:
    """(B,) SiD's loss of clean predictions (B, ...), summed over values, by a detached omega of at least 1e-5."""
    gap = f_phi - f_psi
    omega = (f_phi - x).detach().float().abs().flatten(1).mean(1).clamp_min(1e-5)
    return (gap * ((f_phi - x) - alpha * gap)).flatten(1).sum(1) / omega


def score_distance(
    rule: str | None = None, alpha: float = 1.2, sigmas: tuple[float, float] = (0.137, 13.1), guidance: float = 1.0
) -> Objective:
    """The generator's term; with a rule, the row's condition is to be drawn as that one."""
    return ScoreDistance(sigmas, guidance, rule, alpha)


def fake_score(
    *weighted: tuple[str, float], lr: float = 1e-5, sigmas: tuple[float, float] = (0.137, 13.1), guidance: float = 1.0,
    betas: tuple[float, float] = (0.0, 0.999), clip_value: float | None = 1.0,
) -> Player:  # fmt: skip
    """The fake score as the player of a plan, started from the original. weighted: (split, weight) of its terms."""
    import copy

    terms = [Term(FakeScore(sigmas, guidance), on=split, weight=weight) for split, weight in weighted]
    move = Optimizer("adam", lr=lr, betas=betas, clip_value=clip_value)
    return player(FAKE, *terms, network=lambda case, seed: copy.deepcopy(case.model), optimizer=move)
