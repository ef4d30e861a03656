"""Representations and how likely they are: a small VAE as a density model, a bounded push, a contrastive alignment.

None of these reads a label. With e = g(x) the representation at a layer and h a frozen VAE on representations:

    q(e)    = ||h(e) - e||^2                          reconstruction error, low where the VAE has seen such e
    phi(q)  = exp(q / (q + 1)) in [1, e)              bounded, so that pushing away cannot explode
    align_s = c_s - logsumexp_u(c_u / tau),  c = 1 - cos(g(x), g_original(x))

(Shen et al., 2404.00506, eqs. 6 to 9.) Sums over the batch, not means: with Adam on a sum of two splits, what counts is
how many rows each of them has. Every value below is multiplied by the batch's length, so that a term's mean is the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import BadSetting
from expunge.parts.objectives.base import Objective
from expunge.parts.step import Step
from expunge.tasks.base import PerExample


class VAE(nn.Module):
    """d -> hidden -> (mean, log variance) of `latent` numbers -> hidden reversed -> d, ReLU between.

    output: "identity", or "sigmoid" as in the official code, which can never reconstruct signed representations.
    """

    def __init__(self, width: int, latent: int = 8, hidden: Sequence[int] = (128, 32), output: str = "identity"):
        super().__init__()
        if output not in ("identity", "sigmoid"):
            raise BadSetting(
                f"expected the decoder's output to be 'identity' or 'sigmoid', found {output!r}; choose one"
            )
        self.latent = latent
        self.encoder = nn.Sequential(*_relu_layers([width, *hidden]))
        self.mean = nn.Linear(hidden[-1], latent)
        self.log_variance = nn.Linear(hidden[-1], latent)
        last: list[nn.Module] = [nn.Linear(hidden[0], width)] + ([nn.Sigmoid()] if output == "sigmoid" else [])
        self.decoder = nn.Sequential(*_relu_layers([latent, *reversed(hidden)]), *last)

    def forward(self, e: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """e (B, width), noise (B, latent) standard normal -> reconstruction (B, width), mean and log variance (B,
        latent)."""
        code = self.encoder(e)
        mean, log_variance = self.mean(code), self.log_variance(code)
        return self.decoder(mean + torch.exp(0.5 * log_variance) * noise), mean, log_variance

    def sample(self, e: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The forward pass with noise drawn from a CPU generator. Also used after training, as the official code
        does."""
        return self(e, torch.randn(len(e), self.latent, generator=rng).to(e))


def squared_error(reconstruction: Tensor, e: Tensor) -> PerExample:
    """||reconstruction - e||^2, (B,)."""
    return (reconstruction - e).square().sum(1)


def normal_divergence(mean: Tensor, log_variance: Tensor) -> PerExample:
    """KL(N(mean, variance) || N(0, 1)) in nats, (B,)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def bounded(q: Tensor) -> Tensor:
    """exp(q / (q + 1)): 1 at q = 0, towards e for large q, where the gradient vanishes."""
    return torch.exp(q / (q + 1))


def contrast(keep: PerExample, push: PerExample, tau: float) -> PerExample:
    """log(exp(c_s) / sum_u exp(c_u / tau)) for each kept row: keep (S,), push (U,) -> (S,)."""
    return keep - torch.logsumexp(push / tau, 0)


@dataclass(frozen=True)
class Reconstruct(Objective):
    """Train a VAE on a frozen model's representations: ||h(e) - e||^2 + beta KL. The network under training is the
    VAE."""

    layer: str
    beta: float = 0.025
    reference: str = "original"

    @property
    def layers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.layer,)

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "features"),)

    def __call__(self, step: Step) -> PerExample:
        e = step.reference_features(self.reference)[self.layer].flatten(1)
        reconstruction, mean, log_variance = step.model.sample(e, step.rng)  # type: ignore[operator]
        return squared_error(reconstruction, e) + self.beta * normal_divergence(mean, log_variance)

    def __str__(self) -> str:
        return f"vae({self.reference}:{self.layer})"


@dataclass(frozen=True)
class Density(Objective):
    """phi(q) of the model's representations under a trained VAE, to be lowered, or with `away` to be raised.

    The gradient flows through what the VAE reads and through what it is compared with; the VAE stays as it is.
    """

    layer: str
    vae: str
    away: bool = False

    @property
    def layers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.layer,)

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.vae, "features"),)

    def __call__(self, step: Step) -> PerExample:
        e = step.features[self.layer].flatten(1)
        reconstruction, _, _ = step.references.model(self.vae).sample(e, step.rng)  # type: ignore[operator]
        value = bounded(squared_error(reconstruction, e)) * len(e)
        return -value if self.away else value

    def __str__(self) -> str:
        return f"{'-' if self.away else ''}φ({self.vae}; {self.layer})"


@dataclass(frozen=True)
class Align(Objective):
    """Keep this split's representations in a frozen model's directions, and turn the `push` split's away from theirs.

    Over several processes the sum over pushed rows is that of each process's own rows.
    """

    layer: str
    tau: float = 20.0
    push: str = "forget"
    reference: str = "original"

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise BadSetting(f"expected tau > 0, found {self.tau}; use a positive temperature")

    @property
    def layers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.layer,)

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "features"),)

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.push,)

    def __call__(self, step: Step) -> PerExample:
        if self.push not in step.peers:
            raise BadSetting(
                f"expected the rows of '{self.push}' in the same update, found {', '.join(step.peers) or 'none'}; "
                f"use rhythm='together' and a term on '{self.push}'"
            )
        return contrast(self._turned(step), self._turned(step.peers[self.push]), self.tau) * len(step.batch)

    def _turned(self, step: Step) -> PerExample:
        own = step.features[self.layer].flatten(1)
        other = step.references.features(self.reference, step.batch, self.layers)[self.layer].flatten(1)
        return 1 - F.cosine_similarity(own, other, dim=1)

    def __str__(self) -> str:
        return f"align({self.reference}:{self.layer}, {self.push}/τ={self.tau:g})"


def _relu_layers(sizes: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return layers


def reconstruct(layer: str, beta: float = 0.025, reference: str = "original") -> Objective:
    """Train a density model (the network of an `Auxiliary` phase) on representations at `layer`."""
    return Reconstruct(layer, beta, reference)


def typical(layer: str, vae: str) -> Objective:
    """Make representations at `layer` likely under a trained density model."""
    return Density(layer, vae)


def atypical(layer: str, vae: str) -> Objective:
    """Make representations at `layer` unlikely under a trained density model, up to the bound of phi."""
    return Density(layer, vae, away=True)


def align(layer: str, tau: float = 20.0, push: str = "forget", reference: str = "original") -> Objective:
    """Contrast directions with a frozen model: near on this split, away on the `push` split of the same update."""
    return Align(layer, tau, push, reference)
