"""Distil a diffusion model into a one-step generator by scores: SiD's two losses, across conditions.

G draws x = G(z, c); x_t = a x + b e at t between two noise levels. The teacher phi is frozen, the fake score psi is a player that learns
to denoise what G draws. With clean predictions f at x_t,

    psi:  || o_psi(x_t, t, c) - target ||^2                                     x not differentiated
    G:    (f_phi - f_psi) . ( (f_phi - x) - alpha (f_phi - f_psi) ) / omega      omega = mean |f_phi - x|, a number

both summed over an image's values. Gradients of the second reach G through x in both networks' inputs (their weights hold still).
A sample that is not finite is dropped from its loss and counted.
f_phi may be asked another condition than f_psi: then what G draws for c is pulled to what the teacher draws for that one.
SiD: Zhou et al., 2404.04057; across conditions: Score Forgetting Distillation, 2409.11219.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

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

    def prepare(self, workbench: Any, split: str) -> dict[str, int]:
        """How many samples were dropped, by term: in the run's notes."""
        return workbench.notes.setdefault("dropped", {})

    def draws(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """(z, t, e) of the batch: what is drawn from, when and with which noise it is looked at."""
        generator: Any = step.networks["model"]
        shape, place = (len(step.batch), *generator.shape), generator.device
        z = torch.randn(shape, generator=step.rng)
        low, high = timesteps_of(generator, self.sigmas)
        t = torch.randint(low, high + 1, shape[:1], generator=step.rng)
        return z.to(place), t.to(place), torch.randn(shape, generator=step.rng).to(place)

    def finite(self, step: Step, losses: Callable[[Tensor], Tensor]) -> PerExample:
        """(B,) losses(rows), where samples that are not finite count 0: they are dropped and counted.

        The others are asked once more without them, since what is NaN inside a network is so in its gradient even at weight 0.
        """
        rows = torch.arange(len(step.batch))
        found = losses(rows)
        kept = found.isfinite().cpu()
        if bool(kept.all()) or not bool(kept.any()):  # none is left: the loop's own guard ends the run
            return found
        known = step.scratch.get("memory")
        if known is not None:
            name = f"{self} [{step.split}]"
            known[name] = known.get(name, 0) + int((~kept).sum())
        return torch.zeros_like(found).index_copy(0, rows[kept].to(found.device), losses(rows[kept]))

    def said(self, model: Any, noisy: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """A score network's output under guidance."""
        none = None if self.guidance == 1.0 else model.encode(model.conditions.like(condition))
        return model.guided(noisy, t, model.encode(condition), none, self.guidance, {}).float()


@dataclass(frozen=True)
class FakeScore(Scored):
    """The player's term: `step.model` is the fake score."""

    def __call__(self, step: Step) -> PerExample:
        model, generator = cast(Any, step.model), cast(Any, step.networks["model"])
        own = cast(Any, step.task).condition(step.batch)
        z, t, e = self.draws(step)

        def losses(rows: Tensor) -> Tensor:
            with torch.no_grad():
                x = generator.draw(z[rows], generator.encode(own[rows]))
            output = self.said(model, generator.noised(x, e[rows], t[rows]), t[rows], own[rows])
            return (output - model.target(x, e[rows], t[rows])).square().flatten(1).sum(1)

        return self.finite(step, losses)

    def __str__(self) -> str:
        return "error on G(z)"


@dataclass(frozen=True)
class ScoreDistance(Scored):
    """The generator's term. rule: the condition that the teacher is asked instead of the row's own."""

    rule: str | None = None
    alpha: float = 1.2
    reads = (("original", "features"),)

    def __call__(self, step: Step) -> PerExample:
        teacher, fake = cast(Any, step.references.model("original")), cast(Any, step.networks[FAKE])
        generator = cast(Any, step.networks["model"])
        own = cast(Any, step.task).condition(step.batch).to(fake.device)
        other = own if self.rule is None else fake.conditions.replaced(own, self.rule)
        z, t, e = self.draws(step)

        def losses(rows: Tensor) -> Tensor:
            x = generator.draw(z[rows], generator.encode(own[rows]))
            noisy, at = generator.noised(x, e[rows], t[rows]), t[rows]
            f_phi = teacher.to_clean(noisy, at, self.said(teacher, noisy, at, other[rows]))
            f_psi = fake.to_clean(noisy, at, self.said(fake, noisy, at, own[rows]))
            return score_loss(x, f_phi, f_psi, self.alpha)

        return self.finite(step, losses)

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
