"""Generative adversarial networks: a generator that makes examples of drawn latents, and the discriminator it was trained with.

A row is a real example (`inputs`). `prepare` draws a latent z into the batch, unless the table has one (`latents`): a table of the
model's own samples, judged (`cases.feedback`), has the latent that each was made of, so an "example" is a latent and its image.

    loss           = softplus(-D(G(z)))           the generator's non-saturating logistic energy, in nats (1406.2661)
    log_likelihood = log sigmoid(D(G(z)))         how much the discriminator believes this latent's image
    contest        = softplus(-D(x)) + softplus(D(G(z)))      the discriminator's, minimised by a player of its own
    divergence     = mean squared difference of two generators' images at the same z

Generic methods that thereby run, on a judged table of own samples (forget: latents whose images show it): ascent, grad_diff,
NegGrad+, NPO, SCRUB's match and leave, bad teacher, SSD, SalUn's mask, every scope, balance and weight-space adversary. A loss
never moves the discriminator, which only a `player` does. Not served, and refused: what relabels (a latent has no answer but its
image), and what reads choices (logits). An adversary in input space would move real images, which no generator's loss reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import UnmetNeed
from expunge.seeds import generator
from expunge.tasks.base import Batch, Measurements, Output, PerExample, Task, evaluating, held_still

LATENT_NAMES = ("latent", "latent_dim", "z_dim", "style_dim", "nz")
"""Attributes of a generator that say how many numbers a latent has."""
PIXELS = 256
"""Numbers of an example above which pictures are averaged to 8 x 8 before their distribution is compared."""


class GanPair(nn.Module):
    """A generator and its discriminator as one module; called, it generates."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    def forward(self, latents: Tensor) -> Tensor:
        return self.generator(latents)


@dataclass(frozen=True)
class Drawn(Output):
    """prediction: (B, ...) the images; `extra["score"]` (B,) the discriminator's logits of them. real: those of the batch's own
    examples, asked only by audits."""

    real: Callable[[], Tensor] = field(default=lambda: torch.empty(0), repr=False)

    def detach(self) -> Output:
        return Drawn(self.prediction.detach(), {k: v.detach() for k, v in self.extra.items()}, self.real)


@dataclass(frozen=True)
class Gan(Task):
    """Latents -> images, and a score of their realness. latent: numbers of a latent; default: what the generator says.

    features: images (N, ...) -> (N, D), in which `evaluate` compares distributions; default: pixels (averaged to 8 x 8).
    """

    inputs: str = "inputs"
    labels: str = "labels"
    latents: str = "latents"
    latent: int | None = None
    features: Callable[[Tensor], Tensor] | None = None
    name = "gan"
    utility = "quality"
    stochastic = True

    @property
    def input(self) -> str:  # type: ignore[override]
        return self.inputs

    # -- the two networks ------------------------------------------------------------------------------------------
    def size(self, model: nn.Module) -> int:
        """How many numbers a latent has."""
        if self.latent is not None:
            return self.latent
        found = getattr(model, "generator", None)
        known = next((int(value) for n in LATENT_NAMES if isinstance(value := getattr(found, n, None), int)), None)
        if known is None:
            raise UnmetNeed(
                f"expected the generator to say how many numbers a latent has ({', '.join(LATENT_NAMES)}), found that it does "
                "not; pass Gan(latent=...)"
            )
        return known

    def draw(self, model: nn.Module, count: int, rng: torch.Generator) -> Tensor:
        """(count, d) standard normal latents, drawn on the CPU for equal draws anywhere, on the model's device."""
        first = next(model.parameters())
        return torch.randn(count, self.size(model), generator=rng).to(first)

    def generate(self, model: Any, latents: Tensor) -> Tensor:
        """(B, ...) images of latents (B, d)."""
        made = model.generator(latents)
        return made[0] if isinstance(made, tuple) else made

    def score(self, model: Any, images: Tensor) -> PerExample:
        """(B,) the discriminator's logits: above 0 it takes an image for real."""
        return model.discriminator(images).reshape(len(images), -1).mean(1)

    def energy(self, model: Any, latents: Tensor) -> PerExample:
        """(B,) softplus(-D(G(z))), with a gradient to the generator alone."""
        with held_still(model.discriminator):
            return F.softplus(-self.score(model, self.generate(model, latents)))

    def contest(self, model: Any, images: Tensor, latents: Tensor) -> PerExample:
        """(B,) softplus(-D(x)) + softplus(D(G(z))), with a gradient to the discriminator alone."""
        with torch.no_grad():
            made = self.generate(model, latents)
        return F.softplus(-self.score(model, images)) + F.softplus(self.score(model, made))

    def sample(
        self, model: nn.Module, count: int, seed: int = 0, *, latents: Tensor | None = None, batch_size: int = 256
    ) -> Tensor:
        """(count, ...) images in eval mode on the CPU: equal seeds give equal images. latents: (count, d) instead of drawn ones."""
        if latents is None:
            latents = self.draw(model, count, generator(seed, "gan", "sample"))
        place = next(model.parameters())
        with evaluating(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # noise that a generator draws by itself
            return torch.cat([self.generate(model, z.to(place)).cpu() for z in latents.split(batch_size)])

    # -- running ---------------------------------------------------------------------------------------------------
    def constants(self, model: nn.Module, data: Any) -> dict[str, Any]:
        """`_latent`: how many numbers a latent has."""
        return {"_latent": self.size(model)}

    def prepare(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Draws `latents` (B, d), unless the table has the latents that its rows were made of. Where nobody has said how many
        numbers they have, the seed of the draw (`_draw`), with which `forward` asks the generator: the same for every model."""
        if self.latents in batch.columns:
            return batch
        inputs, size = batch[self.inputs], batch.columns.get("_latent", self.latent)
        if size is None:
            return batch.with_columns(_draw=int(torch.randint(2**62, (), generator=rng)))
        return batch.with_columns(**{self.latents: torch.randn(len(batch), size, generator=rng).to(inputs)})

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """Images of the batch's latents with their scores, and a gradient to the generator alone."""
        if self.latents not in batch.columns:  # asked outside the loop
            draws = generator(batch.columns.get("_draw", int(batch.ids.sum())), "gan", "forward")
            batch = batch.with_columns(**{self.latents: self.draw(model, len(batch), draws)})

        def real() -> Tensor:
            with torch.no_grad():
                return self.score(model, batch[self.inputs])

        made = self.generate(model, batch[self.latents])
        with held_still(model.discriminator):  # type: ignore[arg-type]
            return Drawn(made, {"score": self.score(model, made)}, real)

    # -- losses and distances --------------------------------------------------------------------------------------
    def loss(self, output: Output, batch: Batch) -> PerExample:
        return F.softplus(-output.extra["score"])

    def divergence(self, output: Output, other: Output, batch: Batch, temperature: float = 1.0) -> PerExample:
        """(B,) mean squared difference of the images at the same latents; symmetric, `temperature` is ignored."""
        return (output.prediction - other.prediction).square().flatten(1).mean(1)

    def relabel(self, batch: Batch, rng: torch.Generator, policy: str = "other") -> Batch:
        raise UnmetNeed(
            "expected a kind of model whose examples have an answer to replace, found gan, where a latent's only answer is its "
            "image; use ascend, leave or npo on the judged latents, or the method adapt_then_unlearn"
        )

    # -- measuring -------------------------------------------------------------------------------------------------
    def compared(self, images: Tensor) -> Tensor:
        """(N, D) float64 features in which distributions are compared."""
        if self.features is not None:
            return self.features(images).reshape(len(images), -1).double()
        if images.dim() == 4 and images[0].numel() > PIXELS:
            images = F.adaptive_avg_pool2d(images, 8)
        return images.flatten(1).double()

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Measurements:
        """`frechet`: Fréchet distance of as many samples (seed 0) to the real rows in `compared` features (an FID of pixels,
        unless features are given); `quality` = minus that; `loss` and `realness` (share that the discriminator believes) of
        the samples; `dropped`: samples that are not finite."""
        rows = [batch[self.inputs].cpu() for batch in batches]
        if not rows:
            nan = float("nan")
            return {"quality": nan, "frechet": nan, "loss": nan, "realness": nan, "dropped": 0, "n": 0}
        real = torch.cat(rows)
        made = self.sample(model, len(real))
        finite = torch.isfinite(made.flatten(1)).all(1)
        place = next(model.parameters()).device
        with evaluating(model):
            scores = torch.cat([self.score(model, part.to(place)).cpu() for part in made.split(256)])
        distance = float("inf")
        if int(finite.sum()) > 1:
            distance = frechet(self.compared(made[finite]), self.compared(real))
        return {
            "quality": -distance,
            "frechet": distance,
            "loss": float(F.softplus(-scores).mean()),
            "realness": float((scores > 0).double().mean()),
            "dropped": int((~finite).sum()),
            "n": len(real),
        }

    def _real(self, output: Output, batch: Batch) -> Tensor:
        if not isinstance(output, Drawn):
            raise UnmetNeed(
                f"expected what Gan.forward returns, found {type(output).__name__}; run the model through the task"
            )
        return output.real().double()

    def forget_score(self, output: Output, batch: Batch) -> PerExample:
        """(B,) the probability that the discriminator gives a real example to be real (LOGAN, 1705.07663)."""
        return self._real(output, batch).sigmoid()

    def signals(self, output: Output, batch: Batch) -> dict[str, PerExample]:
        """Of the discriminator, which alone has seen the rows: `loss` = -softplus(-D(x)), `margin` = D(x)."""
        score = self._real(output, batch)
        return {"loss": -F.softplus(-score), "margin": score}

    # -- checks ----------------------------------------------------------------------------------------------------
    def problems(self, model: nn.Module, batch: Batch) -> list[str]:
        parts = [n for n in ("generator", "discriminator") if not isinstance(getattr(model, n, None), nn.Module)]
        if parts:
            return [
                f"expected the model to have a generator and a discriminator, found {type(model).__name__} without "
                f"{' and '.join(parts)}, so the task cannot run on it; wrap them: expunge.GanPair(generator, discriminator)"
            ]
        if self.inputs not in batch.columns:
            have = ", ".join(sorted(k for k in batch.columns if not k.startswith("_")))
            return [f"expected a column '{self.inputs}', found {have}; rename it or pass Gan(inputs=...)"]
        if not batch[self.inputs].is_floating_point():
            return [
                f"expected images as floats of the generator's range, found {batch[self.inputs].dtype}; scale bytes by x / 127.5 - 1"
            ]
        try:
            made = self.sample(model, min(len(batch), 4))
            place = next(model.parameters()).device
            with evaluating(model):
                self.score(model, batch[self.inputs].to(place))
        except Exception as error:
            return [f"expected the model to run on latents and images, found {type(error).__name__}: {error}; check the latent's "
                    "size (Gan(latent=...)) and the images' shape"]  # fmt: skip
        if made.shape[1:] != batch[self.inputs].shape[1:]:
            return [
                f"expected images of the generator's shape {tuple(made.shape[1:])}, found {tuple(batch[self.inputs].shape[1:])}; "
                "resize the data, because the model generates no other"
            ]
        return []


def frechet(first: Tensor, second: Tensor) -> float:
    """||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two samples (N, D) and (M, D): the squared 2-Wasserstein distance of the
    normal distributions fitted to them (Heusel et al., 2017, 1706.08500)."""
    first, second = first.double(), second.double()
    a, b = torch.atleast_2d(first.T.cov()), torch.atleast_2d(second.T.cov())
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return float((first.mean(0) - second.mean(0)).square().sum() + a.trace() + b.trace() - 2 * middle)
