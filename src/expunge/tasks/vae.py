"""Variational autoencoders conditional on a class: any `nn.Module` that encodes and decodes given class labels.

    model.encode(x, c) -> mean, log variance of q(z | x, c), (B, d) each        x: (B, ...) images, c: (B,) int64 class ids
    model.decode(z, c) -> (B, ...), as the images: probabilities ("bernoulli"), their logits ("logits") or means ("gaussian")

A row is an image (`inputs`) and its class (`labels`). `prepare` draws the noise of z into the batch, so that student and reference
see the same.

    loss = -log p(x | z, c) + beta KL(q(z | x, c) || N(0, I)),  z ~ q     the negative ELBO (Kingma and Welling, 1312.6114; conditional:
                                                                       Sohn et al., NeurIPS 2015), nats, a sum over an image's values
    log_likelihood = -loss
    divergence = KL(q' || q) + KL(p'(x | z', c) || p(x | z, c))        of the posteriors, and of what each decodes from its own z

Generic methods that thereby run unchanged: ascent, grad_diff, NPO, NegGrad+, SCRUB, relabel (another row's image, or noise, under
the row's own class), SSD, SalUn's mask, every scope, balance and weight-space adversary; and Selective Amnesia.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import BadSetting, UnmetNeed
from expunge.seeds import generator
from expunge.tasks.base import Batch, Measurements, Output, PerExample, Task, evaluating, move_to_model
from expunge.tasks.conditions import ClassConditions, another_answer, answer_bank
from expunge.tasks.gan import LATENT_NAMES
from expunge.tasks.sampling import Sampling

LIKELIHOODS = ("bernoulli", "logits", "gaussian")
RELABEL_POLICIES = ("other", "noise")


@dataclass(frozen=True)
class Vae(Task):
    """Images and their classes -> images again.

    likelihood: what `decode` returns (see the module's text). sigma: standard deviation of "gaussian". beta: weight of the KL, as
    the model was trained with. latent: numbers of z where neither the model nor data says it (sampling without a table).
    """

    inputs: str = "inputs"
    labels: str = "labels"
    likelihood: str = "bernoulli"
    sigma: float = 1.0
    beta: float = 1.0
    latent: int | None = None
    name = "vae"
    utility = "elbo"
    stochastic = True

    def __post_init__(self) -> None:
        if self.likelihood not in LIKELIHOODS:
            raise BadSetting(
                f"expected a likelihood, one of {', '.join(LIKELIHOODS)}, found {self.likelihood!r}; say what decode returns"
            )
        if self.sigma <= 0 or self.beta < 0:
            raise BadSetting(f"expected sigma > 0 and beta >= 0, found {self.sigma} and {self.beta}; correct them")

    @property
    def input(self) -> str:  # type: ignore[override]
        return self.inputs

    @property
    def relabelled(self) -> str:
        return self.inputs

    # -- classes ---------------------------------------------------------------------------------------------------
    def condition(self, batch: Batch) -> Tensor:
        """(B,) class ids."""
        return batch[self.labels]

    def with_condition(self, batch: Batch, condition: Tensor) -> Batch:
        """The same images under other classes (B,)."""
        return batch.with_columns(**{self.labels: condition})

    def conditioned(self, model: nn.Module, batch: Batch, rule: str) -> Batch:
        """The same images under the class that a rule ("3", "next") puts in place of each row's own; the classes are the table's."""
        classes = ClassConditions(batch["_classes"], None)
        return self.with_condition(batch, classes.replaced(self.condition(batch), rule))

    def constants(self, model: nn.Module, data: Any) -> dict[str, Any]:
        """`_latent`: shape of z; `_classes`: how many the table has; `_range`: least and largest value of an image; `_bank`: rows
        among whose images another answer to a class is drawn."""
        if not len(data):
            return {}
        with evaluating(model):
            row = move_to_model(data.fetch(torch.arange(1)), model)
            shape = tuple(self.encoded(model, row)[0].shape[1:])
        bank = answer_bank(data, self.inputs, self.condition)
        ends = (
            (float(bank["images"].min()), float(bank["images"].max())) if self.likelihood == "gaussian" else (0.0, 1.0)
        )
        return {"_latent": shape, "_classes": int(data.column(self.labels).max()) + 1, "_range": ends, "_bank": bank}

    # -- running ---------------------------------------------------------------------------------------------------
    def encoded(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, d) mean and log variance of q(z | x, c)."""
        mean, log_variance = model.encode(batch[self.inputs], self.condition(batch))
        return mean, log_variance

    def images(self, decoded: Tensor) -> Tensor:
        """(B, ...) the mean image of what `decode` returned."""
        return decoded.sigmoid() if self.likelihood == "logits" else decoded

    def prepare(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Draws `noise` (B, d), the part of z that is not the encoder's. Where nobody has said how many numbers it has, the seed of
        the draw (`_draw`), with which `forward` asks: the same for every model."""
        shape = batch.columns.get("_latent", None if self.latent is None else (self.latent,))
        if "noise" in batch.columns:
            return batch
        if shape is None:
            return batch.with_columns(_draw=int(torch.randint(2**62, (), generator=rng)))
        return batch.with_columns(noise=torch.randn(len(batch), *shape, generator=rng).to(batch[self.inputs].device))

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """What the decoder says of one z for each row; `extra`: `mean`, `log_variance` of q."""
        mean, log_variance = self.encoded(model, batch)
        noise = batch.columns.get("noise")
        if noise is None:  # asked outside the loop
            seed = batch.columns.get("_draw", int(batch.ids.sum()))
            noise = torch.randn(mean.shape, generator=generator(seed, "vae", "noise"))
        z = mean + (0.5 * log_variance).exp() * noise.to(mean)
        decoded = model.decode(z, self.condition(batch))  # type: ignore[operator]
        return Output(decoded, {"mean": mean, "log_variance": log_variance})

    # -- losses and distances --------------------------------------------------------------------------------------
    def surprise(self, decoded: Tensor, images: Tensor) -> PerExample:
        """(B,) -log p(images | decoded) in nats."""
        if self.likelihood == "gaussian":
            each = ((images - decoded) / self.sigma).square() / 2 + math.log(self.sigma * math.sqrt(2 * math.pi))
        elif self.likelihood == "logits":
            each = F.binary_cross_entropy_with_logits(decoded, images, reduction="none")
        else:
            each = F.binary_cross_entropy(decoded, images, reduction="none")
        return each.flatten(1).sum(1)

    def rate(self, output: Output) -> PerExample:
        """(B,) KL(q(z | x, c) || N(0, I)) in nats."""
        mean, log_variance = output.extra["mean"], output.extra["log_variance"]
        return (mean.square() + log_variance.exp() - log_variance - 1).flatten(1).sum(1) / 2

    def loss(self, output: Output, batch: Batch) -> PerExample:
        return self.surprise(output.prediction, batch[self.inputs]) + self.beta * self.rate(output)

    def divergence(self, output: Output, other: Output, batch: Batch, temperature: float = 1.0) -> PerExample:
        """(B,) nats, zero where both say the same; the target `other` is the first argument of both divergences, `temperature` is
        ignored."""
        mean, log_variance = output.extra["mean"], output.extra["log_variance"]
        aim, spread = other.extra["mean"], other.extra["log_variance"]
        posterior = log_variance - spread + (spread.exp() + (aim - mean).square()) / log_variance.exp() - 1
        target = self.images(other.prediction)
        decoder = self.surprise(output.prediction, target) - self.surprise(other.prediction, target)
        return posterior.flatten(1).sum(1) / 2 + decoder

    def relabel(self, batch: Batch, rng: torch.Generator, policy: str = "other") -> Batch:
        """The same class, and another answer to it: the image of another row of another class (`other`), or uniform noise over the
        images' range (`noise`, Selective Amnesia's surrogate)."""
        clean = batch[self.inputs]
        if policy == "noise":
            low, high = batch["_range"]
            new = low + (high - low) * torch.rand(clean.shape, generator=rng)
        elif policy == "other":
            new = another_answer(batch["_bank"], self.condition(batch), rng)
        else:
            raise BadSetting(
                f"expected a relabel policy of vae, one of {', '.join(RELABEL_POLICIES)}, found {policy!r}; use one of them"
            )
        return batch.with_columns(**{self.inputs: new.to(clean)})

    # -- drawing ---------------------------------------------------------------------------------------------------
    def size(self, model: nn.Module) -> int:
        """How many numbers z has."""
        named = (getattr(model, name, None) for name in LATENT_NAMES)
        found = self.latent or next((int(value) for value in named if isinstance(value, int)), None)
        if found is None:
            raise UnmetNeed(
                f"expected the model to say how many numbers its latent has ({', '.join(LATENT_NAMES)}), found that "
                f"{type(model).__name__} does not; pass Vae(latent=...)"
            )
        return found

    def sample(self, model: nn.Module, labels: Tensor, seed: int = 0, batch_size: int = 512) -> Tensor:
        """(N, ...) mean images decode(z, c) of z ~ N(0, I) for class ids (N,), in eval mode, on the CPU: equal seeds give equal
        images, and all models draw from the same z."""
        z = torch.randn(len(labels), self.size(model), generator=generator(seed, "vae", "sample"))
        place: Any = next(model.parameters())
        with evaluating(model):
            parts = zip(z.split(batch_size), labels.split(batch_size), strict=True)
            made = [self.images(model.decode(a.to(place), c.to(place.device))).cpu() for a, c in parts]  # type: ignore[operator]
        return torch.cat(made)

    def drawn(self, model: Any, condition: Tensor, sampling: Sampling, seed: int) -> tuple[Tensor, Tensor]:
        """As `Diffusion.drawn`; one decoding needs no sampling."""
        made = self.sample(model, condition.cpu(), seed)
        finite = torch.isfinite(made.flatten(1)).all(1)
        return made[finite], condition.cpu()[finite]

    # -- measuring -------------------------------------------------------------------------------------------------
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Measurements:
        """`elbo` (mean, nats, higher is better), and its parts `distortion` (-log p(x | z, c)) and `rate` (the KL, unweighted)."""
        loss, rate, total = 0.0, 0.0, 0
        with evaluating(model):
            for batch in batches:
                batch = move_to_model(batch, model)
                output = self.forward(model, batch)
                loss += float(self.loss(output, batch).double().sum())
                rate += float(self.rate(output).double().sum())
                total += len(batch)
        if not total:
            nan = float("nan")
            return {"elbo": nan, "distortion": nan, "rate": nan, "loss": nan, "n": 0}
        loss, rate = loss / total, rate / total
        return {"elbo": -loss, "distortion": loss - self.beta * rate, "rate": rate, "loss": loss, "n": total}

    def forget_score(self, output: Output, batch: Batch) -> PerExample:
        """(B,) exp(ELBO / d), d values of an image: the likelihood of one of its values, as a geometric mean."""
        return (-self.loss(output, batch) / batch[self.inputs][0].numel()).exp()

    def signals(self, output: Output, batch: Batch) -> dict[str, PerExample]:
        """`loss` and `margin`: the ELBO; `reconstruction`: its log p(x | z, c) alone (Hilprecht et al., PETS 2019)."""
        elbo = -self.loss(output, batch).double()
        return {
            "loss": elbo,
            "margin": elbo,
            "reconstruction": -self.surprise(output.prediction, batch[self.inputs]).double(),
        }

    # -- checks ----------------------------------------------------------------------------------------------------
    def problems(self, model: nn.Module, batch: Batch) -> list[str]:
        lacks = [name for name in ("encode", "decode") if not callable(getattr(model, name, None))]
        if lacks:
            return [
                f"expected the model to have encode(images, labels) and decode(latents, labels), found {type(model).__name__} "
                f"without {' and '.join(lacks)}; add them, or wrap the model in a module that has them"
            ]
        have = ", ".join(sorted(k for k in batch.columns if not k.startswith("_")))
        missing = [name for name in (self.inputs, self.labels) if name not in batch.columns]
        if missing:
            return [
                f"expected columns {self.inputs} and {self.labels}, found {have}; rename them or pass Vae(inputs=...)"
            ]
        images, labels = batch[self.inputs], batch[self.labels]
        if not images.is_floating_point() or labels.is_floating_point() or labels.dim() != 1:
            return [
                f"expected images as floats and labels as class ids (N,), found {images.dtype} and {labels.dtype} of shape "
                f"{tuple(labels.shape)}; scale bytes by x / 255, and make one-hot labels inside the model"
            ]
        if self.likelihood != "gaussian" and (float(images.min()) < 0 or float(images.max()) > 1):
            return [
                f"expected images in [0, 1] for the likelihood '{self.likelihood}', found {float(images.min()):.3g} to "
                f"{float(images.max()):.3g}; scale them, or pass Vae(likelihood='gaussian')"
            ]
        with evaluating(model):
            try:
                output = self.forward(model, move_to_model(batch, model))
            except Exception as error:
                return [
                    f"expected the model to run on images of shape {tuple(images.shape)} and their labels, found "
                    f"{type(error).__name__}: {error}; encode must return (mean, log variance), and decode take a latent of "
                    "the mean's shape; labels are class ids"
                ]
        made = output.prediction
        if made.shape != images.shape:
            return [
                f"expected decode to return images of shape {tuple(images.shape)}, found {tuple(made.shape)}; reshape them in decode"
            ]
        if self.likelihood == "bernoulli" and not bool(((made >= 0) & (made <= 1)).all()):
            return [
                f"expected decode to return probabilities, found {float(made.min()):.3g} to {float(made.max()):.3g}; pass "
                "Vae(likelihood='logits'), or 'gaussian' for means"
            ]
        return []

    def labelled(self, names: Sequence[str]) -> bool:
        return self.labels in names
