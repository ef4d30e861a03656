"""Keep what the network says at embeddings that no prompt has: SPM's latent anchoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.parts.objectives.base import Objective
from expunge.parts.objectives.redirect import Partial
from expunge.tasks.base import Batch, PerExample

if TYPE_CHECKING:
    from expunge.parts.step import Step


@dataclass(frozen=True)
class Shared(Partial):
    """A partial sampling made once in a step, for all of its terms."""

    def __call__(self, step: Step) -> Batch:
        if "partial" not in step.scratch:
            step.scratch["partial"] = super().__call__(step)
        return step.scratch["partial"]


def drawn_embeddings(target: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """(count, L, d): Gaussian directions of a target's (L, d) flattened norm times U(0.8, 1.2), each accepted with probability
    1 - cos(it, target)."""
    flat = target.detach().float().cpu().flatten()
    found: list[Tensor] = []
    while len(found) < count:
        direction = torch.nn.functional.normalize(torch.randn(len(flat), generator=rng), dim=0)
        cosine = torch.dot(direction, flat / flat.norm())
        if float(torch.rand(1, generator=rng)) < 1 - float(cosine):
            found.append(direction * flat.norm() * (0.8 + 0.4 * torch.rand(1, generator=rng)))
    return torch.stack(found).reshape(count, *target.shape).to(target)


@dataclass(frozen=True)
class KeepAround(Objective):
    count: int = 4
    latents: Partial | None = None

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return (("original", "output"),)

    def __call__(self, step: Step) -> PerExample:
        task: Any = step.task
        batch = step.batch if self.latents is None else self.latents(step)
        noisy, timestep = batch["noisy"], batch["timestep"]
        with step.references.running("original") as original:
            targets = original.encode(task.condition(batch))  # type: ignore[operator]
            around = torch.cat([drawn_embeddings(row, self.count, step.rng) for row in targets])
            at = (noisy.repeat_interleave(self.count, 0), timestep.repeat_interleave(self.count), around)
            said = original(*at).float()
        own = step.model(*at).float()
        return (own - said).square().flatten(1).mean(1).reshape(len(batch), self.count).mean(1)

    def __str__(self) -> str:
        return f"D(original(around c)‖model, {self.count})"


def keep_around(count: int = 4, latents: Partial | None = None) -> Objective:
    """Mean squared difference to the original at `count` random embeddings for each row (SPM's latent anchoring, 2312.16145).

    latents: where x_t comes from; None: the batch's own `noisy` and `timestep`."""
    return KeepAround(count, latents)
