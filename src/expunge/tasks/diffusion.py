"""Diffusion: class- or text-conditional denoisers of diffusers, with noise, clean, velocity or flow prediction.

A row is what the network denoises (`latents`: the images themselves for a pixel model) and its condition: `labels` (class ids)
or `input_ids` (a prompt's tokens). `prepare` draws timestep and noise into the batch, so that student and reference see the
same x_t; a batch may bring its own x_t as `noisy` (ESD's partial sampling) or word embeddings as `prefix` (prompt attacks).

    loss = mean over elements of (o(x_t, t, c) - target)^2     mean squared error, not a sum: SalUn's DDPM code sums, so its
                                                               alpha of 1e-3 is 1e-3 times the number of elements here
    log_likelihood = -loss                                     the evidence bound up to a weight in t and a constant

Generic methods that thereby run unchanged: ascent, grad_diff, NPO, NegGrad+, SCRUB's match and leave, relabel (another row's
image, or noise, under the row's own condition), SSD, SalUn's mask, every scope, balance and weight-space adversary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import BadSetting
from expunge.tasks.base import Batch, Measurements, Output, PerExample, Task, evaluating, move_to_model
from expunge.tasks.conditions import ClassConditions, another_answer, answer_bank
from expunge.tasks.sampling import Sampling, sample

RELABEL_POLICIES = ("other", "noise")


@dataclass(frozen=True)
class Diffusion(Task):
    """Noisy latents and a condition -> the network's prediction.

    max_timestep, min_timestep: shares of the schedule between which timesteps are drawn (0 and 1: all of it).
    """

    latents: str = "latents"
    labels: str = "labels"
    prompts: str = "input_ids"
    min_timestep: float = 0.0
    max_timestep: float = 1.0
    name = "diffusion"
    utility = "explained"
    stochastic = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_timestep < self.max_timestep <= 1:
            raise BadSetting(
                f"expected 0 <= min_timestep < max_timestep <= 1, found {self.min_timestep} and {self.max_timestep}; "
                "give shares of the schedule"
            )

    @property
    def input(self) -> str:  # type: ignore[override]
        return self.latents

    @property
    def relabelled(self) -> str:
        return self.latents

    # -- conditions ------------------------------------------------------------------------------------------------
    def condition(self, batch: Batch) -> Tensor:
        """(B,) class ids or (B, L) token ids."""
        return batch[self.prompts] if self.prompts in batch.columns else batch[self.labels]

    def conditioned(self, model: Any, batch: Batch, rule: str) -> Batch:
        """The same x_t under the condition that a rule puts in place of each row's own (see `tasks.conditions`)."""
        return self.with_condition(batch, model.conditions.replaced(self.condition(batch), rule))

    def with_condition(self, batch: Batch, condition: Tensor) -> Batch:
        """The same x_t under other conditions (B,) or (B, L)."""
        name = self.prompts if self.prompts in batch.columns else self.labels
        return batch.with_columns(**{name: condition})

    def constants(self, model: nn.Module, data: Any) -> dict[str, Any]:
        """`_bank`: some rows, among whose images another answer to a condition is drawn."""
        return {"_bank": answer_bank(data, self.latents, self.condition)} if len(data) else {}

    # -- running ---------------------------------------------------------------------------------------------------
    def prepare(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Draws `noise` (B, C, H, W) and `level` (B,), uniform in [0, 1), from which the model's schedule makes the timestep;
        on the CPU, for equal draws anywhere. What the batch brings stays."""
        clean = batch[self.latents]
        drawn: dict[str, Tensor] = {}
        if "level" not in batch.columns:
            drawn["level"] = torch.rand(len(batch), generator=rng).to(clean.device)
        if "noise" not in batch.columns:
            drawn["noise"] = torch.randn(clean.shape, generator=rng).to(clean.device)
        return batch.with_columns(**drawn)

    def timestep(self, model: Any, batch: Batch) -> Tensor:
        """(B,) int64: the batch's own, or its level's share of the schedule between `min_timestep` and `max_timestep`."""
        own = batch.columns.get("timestep")
        if own is not None:
            return own
        share = self.min_timestep + batch["level"] * (self.max_timestep - self.min_timestep)
        return (share * model.horizon).long().clamp(max=model.horizon - 1) + int(model.flow)

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """The network's prediction, in float32; `extra`: x_t (`noisy`), `timestep`, and the `target` where x_t was made here."""
        timestep, noisy, extra = self.timestep(model, batch), batch.columns.get("noisy"), {}
        if noisy is None:
            clean, noise = batch[self.latents].float(), batch["noise"]
            noisy = model.noised(clean, noise, timestep)  # type: ignore[operator]
            extra["target"] = model.target(clean, noise, timestep)  # type: ignore[operator]
        encoded = model.encode(self.condition(batch), batch.columns.get("prefix"))  # type: ignore[operator]
        prediction = model(noisy, timestep, encoded).float()
        return Output(prediction, {"noisy": noisy, "timestep": timestep, **extra})

    # -- losses and distances --------------------------------------------------------------------------------------
    def loss(self, output: Output, batch: Batch) -> PerExample:
        """(B,) mean squared error of the prediction against what the network was trained to say."""
        return (output.prediction - output.extra["target"]).square().flatten(1).mean(1)

    def divergence(self, output: Output, other: Output, batch: Batch, temperature: float = 1.0) -> PerExample:
        """(B,) mean squared difference of two predictions at the same x_t; symmetric, `temperature` is ignored."""
        return (output.prediction - other.prediction).square().flatten(1).mean(1)

    def relabel(self, batch: Batch, rng: torch.Generator, policy: str = "other") -> Batch:
        """The same condition, and another answer to it: the image of another row with another condition (`other`), or uniform
        noise in [-1, 1] (`noise`, Selective Amnesia's surrogate). To put another condition in place of the row's own, see
        `conditioned` and the objective `redirect`."""
        clean = batch[self.latents]
        if policy == "noise":
            new = torch.rand(clean.shape, generator=rng).to(clean.device) * 2 - 1
            return batch.with_columns(**{self.latents: new})
        if policy != "other":
            raise BadSetting(
                f"expected a relabel policy of diffusion, one of {RELABEL_POLICIES}, found {policy!r}; use one of them, or the "
                "objective redirect(rule) for another condition"
            )
        new = another_answer(batch["_bank"], self.condition(batch), rng)
        return batch.with_columns(**{self.latents: new.to(clean)})

    # -- drawing ---------------------------------------------------------------------------------------------------
    def drawn(self, model: Any, condition: Tensor, sampling: Sampling, seed: int) -> tuple[Tensor, Tensor]:
        """(M, ...) latents that the model makes for conditions (N, ...), and their conditions, on the CPU; what is not finite is
        left out."""
        samples = sample(model, condition, sampling, seed)
        with torch.no_grad():
            latents = torch.cat([model.latents(x.to(model.device)).cpu() for x in samples.images.split(64)])
        return latents[samples.finite], condition.cpu()[samples.finite]

    # -- measuring -------------------------------------------------------------------------------------------------
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Measurements:
        """`explained`: the share of the target's energy that the model predicts, 1 - error / energy (1 perfect, 0 as good as
        saying zero); `loss`."""
        error, energy, total = 0.0, 0.0, 0
        with evaluating(model):
            for number, batch in enumerate(batches):
                if "noise" not in batch.columns:  # asked outside the loop and the audits, which prepare their batches
                    batch = self.prepare(batch, torch.Generator().manual_seed(number))
                batch = move_to_model(batch, model)
                output = self.forward(model, batch)
                error += float(self.loss(output, batch).double().sum())
                energy += float(output.extra["target"].double().square().flatten(1).mean(1).sum())
                total += len(batch)
        if not total:
            return {"explained": float("nan"), "loss": float("nan"), "n": 0}
        return {"explained": 1 - error / energy, "loss": error / total, "n": total}

    def forget_score(self, output: Output, batch: Batch) -> PerExample:
        """(B,) exp(-loss): near 1 where the model denoises this row under its condition well."""
        return (-self.loss(output, batch)).exp()

    def signals(self, output: Output, batch: Batch) -> dict[str, PerExample]:
        """`loss`: minus the error (Carlini et al. 2023, Duan et al. 2023); `margin`: minus its logarithm, roughly Gaussian."""
        loss = self.loss(output, batch).double()
        return {"loss": -loss, "margin": -(loss.clamp_min(1e-12)).log()}

    def labelled(self, names: Sequence[str]) -> bool:
        return self.labels in names or self.prompts in names

    def answers(self, batch: Batch) -> Tensor | None:
        value = batch.columns.get(self.labels)
        return value if isinstance(value, Tensor) and value.dim() == 1 else None

    # -- checks ----------------------------------------------------------------------------------------------------
    def problems(self, model: nn.Module, batch: Batch) -> list[str]:
        if not hasattr(model, "guided") or not hasattr(model, "conditions"):
            return [
                f"expected the model as a Denoiser for diffusion, found {type(model).__name__}, so the task cannot run on it; "
                "load the pipeline's folder with expunge.load_model(folder), or wrap a live pipeline: expunge.Denoiser(pipeline)"
            ]
        have = ", ".join(sorted(k for k in batch.columns if not k.startswith("_")))
        needed = self.prompts if model.kind == "text" else self.labels
        missing = [name for name in (self.latents, needed) if name not in batch.columns]
        if missing:
            return [
                f"expected columns {self.latents} and {needed} for a {model.kind}-conditional model, found {have}; build the "
                "table with expunge.pictures(model, images, ...)"
            ]
        if tuple(batch[self.latents].shape[1:]) != model.shape:
            return [
                f"expected {self.latents} of shape {model.shape}, found {tuple(batch[self.latents].shape[1:])}; build the table "
                "with expunge.pictures(model, images, ...), which resizes and encodes"
            ]
        if model.dtype == torch.float16 and model.device.type == "cpu":
            return [
                "expected the model in float32 on a CPU, found the model in float16, which the CPU cannot run on well; load it "
                "with torch_dtype=torch.float32"
            ]
        conditions = model.conditions
        if isinstance(conditions, ClassConditions):
            low, high = int(batch[self.labels].min()), int(batch[self.labels].max())
            if low < 0 or high >= conditions.count:
                why = ", which is the null class" if high == conditions.null_id else ""
                return [
                    f"expected labels in 0..{conditions.count - 1}, found {low}..{high}{why}; renumber them, or load the model "
                    "with null=None (no null class) or null=id"
                ]
        return []
