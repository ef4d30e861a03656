"""Inner players that make a term's gradient harder earned: in weight space, in input space, and averages of iterates. The one
in latent space has a file of its own (`latents.py`).

An adversary changes how the gradient of the terms on its split is taken; the other terms keep theirs
(Fan et al., 2502.05374: only the forget loss is perturbed). Hooks, in the order the loop calls them:

    attack(step, harm)                    -> the step the terms see instead: worst-case inputs or activations
    gradient(take, parameters, rng)       -> the gradient of the attacked terms; `take()` gives it at the weights as they are
    after_step / finish                   -> averages
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.errors import BadSetting

if TYPE_CHECKING:
    from expunge.parts.plan import Term
    from expunge.parts.step import Step
    from expunge.tasks.base import Batch

Gradients = list[Tensor]
Take = Callable[[], Gradients]


class Adversary:
    """Base of all adversaries. `on`: the split whose terms it attacks."""

    on: str = "forget"
    space: str = "weights"
    goal: tuple[Term, ...] = ()
    """What it minimises, where that is not to maximise the attacked terms (latent and input space)."""
    repeats: int = 1
    """Updates of the weights under one attack (latent and input space)."""

    def on_split(self, name: str) -> Adversary:
        """The same adversary on another split."""
        return replace(self, on=name)  # type: ignore[type-var]

    def attack(self, step: Step, harm: Callable[[Step], Tensor]) -> Step:
        """The step that the terms see instead, with `clean` set to this one; harm: what to maximise (latent and input space)."""
        return step

    def gradient(self, take: Take, parameters: list[Tensor], rng: torch.Generator) -> Gradients:
        """The gradient of the attacked terms (weight space only)."""
        return take()


def norm(gradients: Gradients) -> Tensor:
    """Joint L2 norm over all parameters."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))


class moved:
    """Context: the weights moved by `scale * direction`, and restored to the very same bits afterwards."""

    def __init__(self, parameters: list[Tensor], direction: Gradients, scale: float | Tensor):
        self.parameters, self.direction, self.scale = parameters, direction, scale

    @torch.no_grad()
    def __enter__(self) -> None:
        self.saved = [p.detach().clone() for p in self.parameters]
        for p, d in zip(self.parameters, self.direction, strict=True):
            p.add_(d * self.scale)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for p, saved in zip(self.parameters, self.saved, strict=True):
            p.copy_(saved)


@dataclass(frozen=True)
class SAM(Adversary):
    """Gradient at theta + rho g/||g|| (Foret et al., 2021; SAM for unlearning, 2502.05374)."""

    rho: float = 0.01
    on: str = "forget"

    def gradient(self, take: Take, parameters: list[Tensor], rng: torch.Generator) -> Gradients:
        g = take()
        with moved(parameters, g, self.rho / norm(g).clamp_min(1e-12)):
            return take()

    def __str__(self) -> str:
        return f"sam(ρ={self.rho:g})"


@dataclass(frozen=True)
class RandomSmoothing(Adversary):
    """Mean gradient over `draws` Gaussian perturbations of the weights with std sigma."""

    sigma: float = 1e-4
    draws: int = 3
    on: str = "forget"

    def gradient(self, take: Take, parameters: list[Tensor], rng: torch.Generator) -> Gradients:
        total: Gradients | None = None
        for _ in range(self.draws):
            noise = [torch.randn(p.shape, generator=rng).to(p) for p in parameters]
            with moved(parameters, noise, self.sigma):
                g = take()
            total = g if total is None else [a + b for a, b in zip(total, g, strict=True)]
        return [t / self.draws for t in total or []]

    def __str__(self) -> str:
        return f"smooth(σ={self.sigma:g})"


@dataclass(frozen=True)
class GradientPenalty(Adversary):
    """Gradient of l + lam ||g||, by the finite difference g + (lam/mu)(grad l(theta + mu g/||g||) - g); lam = mu is SAM.

    The official code takes the norm with .item(), which has no gradient; this is the equation.
    """

    lam: float = 0.1
    mu: float = 0.01
    on: str = "forget"

    def gradient(self, take: Take, parameters: list[Tensor], rng: torch.Generator) -> Gradients:
        g = take()
        with moved(parameters, g, self.mu / norm(g).clamp_min(1e-12)):
            ahead = take()
        return [a + (self.lam / self.mu) * (b - a) for a, b in zip(g, ahead, strict=True)]

    def __str__(self) -> str:
        return f"gradient_penalty(λ={self.lam:g})"


@dataclass(frozen=True)
class Curvature(Adversary):
    """Gradient of l + lam ||grad l(theta + mu ghat) - g||, with ghat held fixed, by finite differences."""

    lam: float = 0.1
    mu: float = 0.01
    eps: float = 0.001
    on: str = "forget"

    def gradient(self, take: Take, parameters: list[Tensor], rng: torch.Generator) -> Gradients:
        g = take()
        scale = self.mu / norm(g).clamp_min(1e-12)
        with moved(parameters, g, scale):
            ahead = take()
        d = [a - b for a, b in zip(ahead, g, strict=True)]
        size = norm(d)
        if size <= 1e-12:
            return g
        v = [x / size for x in d]
        with moved(parameters, v, self.eps):
            beside = take()
        both = [x * scale + y * self.eps for x, y in zip(g, v, strict=True)]
        with moved(parameters, both, 1.0):
            beyond = take()
        change = self.lam / self.eps
        return [
            a + change * ((far - near) - (side - a))
            for a, near, side, far in zip(g, ahead, beside, beyond, strict=True)
        ]

    def __str__(self) -> str:
        return f"curvature(λ={self.lam:g})"


@dataclass(frozen=True)
class InputAttack(Adversary):
    """Projected gradient descent on the inputs: the batch that makes the attacked terms worst within an L-inf ball
    (Madry et al., 2018). steps=1, step_size=radius is FGSM."""

    radius: float = 0.03
    steps: int = 5
    step_size: float | None = None
    low: float | None = 0.0
    high: float | None = 1.0
    on: str = "forget"
    space = "inputs"

    def __post_init__(self) -> None:
        if self.radius < 0 or self.steps < 1:
            raise BadSetting(f"expected radius >= 0 and steps >= 1, found {self.radius} and {self.steps}; correct them")

    def attack(self, step: Step, harm: Callable[[Step], Tensor]) -> Step:
        hard = step.again()
        hard.batch, hard.clean = self.inputs(step, harm), step
        step.references.fresh_inputs = True
        return hard

    def inputs(self, step: Step, objective: Callable[[Step], Tensor]) -> Batch:
        """The batch within the ball that makes the objective largest."""
        name = step.task.input
        clean = step.batch[name]
        size = self.step_size if self.step_size is not None else 2.5 * self.radius / self.steps
        x = clean.clone()
        for _ in range(self.steps):
            x = x.detach().requires_grad_(True)
            trial = step.again()
            trial.batch = step.batch.with_columns(**{name: x})
            trial.scratch = {k: v for k, v in step.scratch.items() if k == "memory"}
            (g,) = torch.autograd.grad(objective(trial), x)
            x = clean + (x + size * g.sign() - clean).clamp(-self.radius, self.radius)
            if self.low is not None or self.high is not None:
                x = x.clamp(self.low, self.high)
        return step.batch.with_columns(**{name: x.detach()})

    def __str__(self) -> str:
        return f"pgd(ε={self.radius:g}, {self.steps})"


@dataclass(frozen=True)
class Average:
    """Mean of the weights every `every` steps from step `start` on; the mean is what comes out (WA). A start below 1 is a share
    of all steps."""

    start: float = 0
    every: int = 1

    def __post_init__(self) -> None:
        if self.start < 0 or self.every < 1:
            raise BadSetting(
                f"expected start >= 0 (a step, or a share of all below 1) and every >= 1, found {self.start} and {self.every}; "
                "correct them"
            )

    def __str__(self) -> str:
        return f"average(from {self.start:g}, every {self.every})"

    def takes(self, step: int, total: int = 0) -> bool:
        """Whether the weights after update number `step` (from 1) of `total` enter the mean."""
        start = math.ceil(self.start * total) if 0 < self.start < 1 else int(self.start)
        return step >= start and (step - start) % self.every == 0

    def share(self, taken: int) -> float:
        """How much of the mean the weights taken as number `taken` (from 1) are."""
        return 1.0 / taken


@dataclass(frozen=True)
class MovingAverage:
    """mean <- decay * mean + (1 - decay) * weights after every update, from the weights before the first; the mean is what comes
    out, and the weights themselves are what is trained (a generator's, 1710.10196)."""

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise BadSetting(f"expected a decay in 0..1 (1 left out), found {self.decay}; correct it")

    def __str__(self) -> str:
        return f"moving average({self.decay:g})"

    def takes(self, step: int, total: int = 0) -> bool:
        return True

    def share(self, taken: int) -> float:
        return 1.0 - self.decay


def sam(rho: float = 0.01, on: str = "forget") -> Adversary:
    """Sharpness-aware: a small worst-case step of the weights before each gradient. rho: L2 over all weights."""
    return SAM(rho, on)


def smooth(sigma: float = 1e-4, draws: int = 3, on: str = "forget") -> Adversary:
    """Random smoothing in weight space."""
    return RandomSmoothing(sigma, draws, on)


def gradient_penalty(lam: float = 0.1, mu: float = 0.01, on: str = "forget") -> Adversary:
    """Penalise the gradient's norm."""
    return GradientPenalty(lam, mu, on)


def curvature(lam: float = 0.1, mu: float = 0.01, on: str = "forget") -> Adversary:
    """Penalise the change of the gradient along itself."""
    return Curvature(lam, mu, on=on)


def pgd(radius: float = 0.03, steps: int = 5, on: str = "forget", **settings: Any) -> Adversary:
    """Worst-case inputs within an L-infinity ball of `radius` (in the inputs' own unit)."""
    return InputAttack(radius, steps, on=on, **settings)


def moving_average(decay: float = 0.999, half_life: float | None = None) -> MovingAverage:
    """Exponential moving average of the weights, for `Plan(average=...)`. half_life: in updates, instead of a decay."""
    return MovingAverage(0.5 ** (1.0 / half_life) if half_life else decay)


def average(start: float = 0, every: int = 1) -> Average:
    """Weight averaging over the last iterates, for `Plan(average=...)`. start: a step, or below 1 a share of all steps."""
    return Average(start, every)
