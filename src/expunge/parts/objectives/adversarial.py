"""The two sides of a generative adversarial network, and what regularises them. Latents are drawn afresh in every step.

Non-saturating logistic losses (Goodfellow et al., 2014, 1406.2661), R1 (Mescheder et al., 2018, 1801.04406), path length (Karras et
al., 2020, 1912.04958), which the last applies lazily: `Term(r1(), weight=10 * 16, every=16)`.

    Plan(Term(deceive(), on="retain"), adversary=discriminator(on="retain", lr=2e-3), ...)     # a GAN's training
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from expunge.errors import UnmetNeed
from expunge.parts.adversaries import moving_average
from expunge.parts.objectives.base import Objective
from expunge.parts.plan import Optimizer, Term, Training
from expunge.parts.players import Player, player
from expunge.parts.step import Step
from expunge.tasks.base import PerExample
from expunge.tasks.gan import Gan


@dataclass(frozen=True)
class Deceive(Objective):
    """softplus(-D(G(z))), z drawn afresh."""

    def __call__(self, step: Step) -> PerExample:
        task = of_gan(step)
        return task.energy(step.model, task.draw(step.model, len(step.batch), step.rng))

    def __str__(self) -> str:
        return "s(-D(G))"


@dataclass(frozen=True)
class TellApart(Objective):
    """softplus(-D(x)) + softplus(D(G(z))), z drawn afresh."""

    def __call__(self, step: Step) -> PerExample:
        task = of_gan(step)
        z = task.draw(step.model, len(step.batch), step.rng)
        return task.contest(step.model, step.batch[task.inputs], z)

    def __str__(self) -> str:
        return "s(-D(x))+s(D(G))"


@dataclass(frozen=True)
class R1(Objective):
    """1/2 ||grad_x D(x)||^2 on real examples."""

    def __call__(self, step: Step) -> PerExample:
        task = of_gan(step)
        x = step.batch[task.inputs].detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(task.score(step.model, x).sum(), x, create_graph=True)
        return 0.5 * slope.square().flatten(1).sum(1)

    def __str__(self) -> str:
        return "½‖∇D(x)‖²"


@dataclass(frozen=True)
class PathLength(Objective):
    """(l - a)^2, l = ||grad_w sum(G(w) y)||, y ~ N(0, 1/pixels), a the batch's mean of l, over every second row.

    a is a running mean in the paper; the batch's own keeps the objective a function of the step.
    """

    def __call__(self, step: Step) -> PerExample:
        task = of_gan(step)
        net: Any = step.model.generator
        if not hasattr(net, "mapping") or not hasattr(net, "synthesis"):
            raise UnmetNeed(
                f"expected a generator with mapping and synthesis for the path-length penalty, found {type(net).__name__}; "
                "drop the term"
            )
        styles = net.mapping(task.draw(step.model, max(len(step.batch) // 2, 2), step.rng))
        styles = styles if styles.requires_grad else styles.detach().requires_grad_(True)
        images = net.synthesis(styles)
        pixels = images[0, 0].numel() if images.dim() == 4 else images[0].numel()
        noise = torch.randn(images.shape, generator=step.rng).to(images) / pixels**0.5
        (slope,) = torch.autograd.grad((images * noise).sum(), styles, create_graph=True)
        lengths = slope.flatten(1).square().sum(1).sqrt()
        return (lengths - lengths.mean().detach()).square().mean().expand(len(step.batch))

    def __str__(self) -> str:
        return "(‖∇G‖-a)²"


def of_gan(step: Step) -> Gan:
    """The step's task, which must be of GANs."""
    if not isinstance(step.task, Gan):
        raise UnmetNeed(
            f"expected a generative adversarial network, found a case of {step.task.name}; use this term with task='gan'"
        )
    return step.task


def discriminator_logit(step: Step) -> PerExample:
    """(B,) D(G(z)) at the batch's own latents: what the Fisher information of a generator is taken of (2012.02780)."""
    of_gan(step)
    return step.output.extra["score"]


def deceive() -> Objective:
    """The generator's term."""
    return Deceive()


def tell_apart() -> Objective:
    """The discriminator's term."""
    return TellApart()


def r1() -> Objective:
    """The discriminator's gradient penalty on real examples."""
    return R1()


def path_length() -> Objective:
    """The penalty on uneven steps from style to image; for generators with `mapping` and `synthesis`."""
    return PathLength()


def discriminator(
    on: str = "retain",
    lr: float = 2e-3,
    penalty: float = 10.0,
    every: int = 16,
    betas: tuple[float, float] = (0.0, 0.99),
) -> Player:
    """The pair's own discriminator as the player of a plan, with a lazy R1 penalty: `penalty` weighs 1/2 ||grad D||^2, every so
    many updates. lr and betas are scaled by every / (every + 1) as in StyleGAN2."""
    terms = [Term(tell_apart(), on=on)]
    if penalty:
        terms.append(Term(r1(), on=on, weight=penalty * every, every=every))
    move = lazily(Optimizer("adam", lr=lr, betas=betas), every if penalty else 0)
    return player("discriminator", *terms, network="discriminator", optimizer=move)


def gan_training(
    epochs: int, batch_size: int, optimizer: Optimizer, penalty: float = 10.0, half_life: float = 10_000
) -> Training:
    """The recipe of a GAN: both networks by the same Adam, a lazy R1 penalty, and the generator's moving average (its half-life in
    images) as what comes out."""
    return Training(
        epochs=epochs, batch_size=batch_size, optimizer=optimizer, objective=deceive(),
        adversary=discriminator(lr=optimizer.lr, penalty=penalty, betas=optimizer.betas),
        average=moving_average(half_life=half_life / batch_size),
    )  # fmt: skip


def lazily(optimizer: Optimizer, every: int) -> Optimizer:
    """The optimizer with step size and betas scaled for one more update at every so many (1912.04958, appendix B); 0: as it is."""
    if not every:
        return optimizer
    ratio = every / (every + 1)
    b1, b2 = optimizer.betas
    return replace(optimizer, lr=optimizer.lr * ratio, betas=(b1**ratio if b1 else 0.0, b2**ratio))
