"""Forget-Me-Not's attention re-steering: what the network looks at when it reads the concept's tokens, made small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.parts.attention_maps import attention_maps, positions_of
from expunge.parts.objectives.base import Objective
from expunge.tasks.base import Batch, PerExample

if TYPE_CHECKING:
    from expunge.parts.step import Step


@dataclass(frozen=True)
class AttentionNorm(Objective):
    concept: str
    template: str | None = None
    end_tokens: bool = False
    pure_noise: bool = False

    def told(self, step: Step) -> Batch:
        """The step's batch under the concept's prompt, its x_t noised images or noise alone."""
        task: Any = step.task
        batch = step.batch
        if self.template is not None:
            # of several words for the concept, the rows take turns
            prompts = [self.template.format(words.strip()) for words in self.concept.split("|")]
            own = task.condition(batch)
            written = step.model.conditions.of(prompts).to(own.device)  # type: ignore[operator, union-attr]
            batch = task.with_condition(batch, written[batch.ids.to(own.device) % len(written)])
        if self.pure_noise:
            batch = batch.with_columns(noisy=batch["noise"], timestep=task.timestep(step.model, batch))
        return batch

    def watched(self, model: Any, condition: Tensor) -> Tensor:
        """(B, L) bool: the concept's positions in each prompt, and its end tokens' where asked for."""
        mask = torch.zeros(condition.shape, dtype=torch.bool)
        for number, row in enumerate(condition.cpu()):
            places = positions_of(model.conditions, row, self.concept)
            mask[number, places] = True
            if self.end_tokens and places:
                mask[number] |= row == model.conditions.tokenizer.eos_token_id
        return mask.to(condition.device)

    def __call__(self, step: Step) -> PerExample:
        task: Any = step.task
        batch = self.told(step)
        mask = self.watched(step.model, task.condition(batch)).float()
        with attention_maps(step.model) as maps:
            step.forward(batch)
        squares = torch.stack(
            [(a.float().square() * mask[:, None, None]).flatten(1).sum(1) for a in maps.values()]
        ).sum(0)
        # the norm is of the whole batch: a row's value is its share of it, and the mean over rows has its value and gradient
        norm = squares.detach().sum().sqrt().clamp_min(1e-12)
        return len(batch) * (squares + squares.detach()) / (2 * norm)

    def __str__(self) -> str:
        return f"‖A[{self.concept}{', end' if self.end_tokens else ''}]‖"


def attention_norm(
    concept: str, template: str | None = None, end_tokens: bool = False, pure_noise: bool = False
) -> Objective:
    """|| all cross-attention probabilities of the concept's tokens ||_2, not squared, over the batch (Zhang et al., 2303.17591).

    concept: words; "red | crimson" is either. template: the prompt that the rows are told, with {} for the words; None: their own,
        and rows without the concept count for nothing. end_tokens: the end tokens' positions too. pure_noise: no images are read.
    """
    return AttentionNorm(concept, template, end_tokens, pure_noise)
