"""Guards of diffusion models: what is sampled changes, the pipeline's weights stay as they are.

    SafeGuidance      guidance is turned away from a concept where it agrees with it        SLD, Schramowski et al., 2211.05105
    NegativePrompt    guidance starts from the concept instead of from nothing              plain control
    SoftEndTokens     the concept is taken out of the end tokens' embeddings                SEOT, Li et al., 2402.05375

A guard has its base's interface, so `sample`, judges, attacks and the diffusion task run on it. Whatever its `encode` gives goes to its
own `forward` and `guided`, and may hold more than the base's does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import UnmetNeed
from expunge.parts.attention_maps import cross_attention, end_of, positions_of
from expunge.parts.guarded import Guarded
from expunge.tasks.denoiser import Denoiser

INTERFACE = (
    "kind", "conditions", "shape", "scheduler", "horizon", "flow", "latents", "images", "levels", "timesteps", "noised", "target",
    "to_clean", "to_noise", "from_noise", "tokenizer", "prediction_type", "network", "network_name", "null_given", "text_encoder",
)  # fmt: skip
"""What a guard takes over from its `Denoiser`, beside device, dtype and config. Not `pipeline`: that would be the bare one."""


class GuardedDenoiser(Guarded):
    """Base of guards around a `Denoiser`. Subclasses change `encode`, `forward` or `guided`."""

    def __init__(self, base: nn.Module):
        if not isinstance(base, Denoiser) or hasattr(base, "draw"):
            raise UnmetNeed(
                f"expected a diffusion model that is sampled step by step, found {type(base).__name__}; give several concepts to "
                "one guard, and guard the model that a one-step generator was made from"
            )
        super().__init__(base)

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattr__("base"), name) if name in INTERFACE else super().__getattr__(name)

    def encode(self, condition: Tensor, prefix: Tensor | None = None, words: Tensor | None = None) -> Tensor:
        """As `Denoiser.encode`."""
        return self.base.encode(condition, prefix, words)  # type: ignore[operator]

    def forward(self, noisy: Tensor, timestep: Tensor, encoded: Tensor) -> Tensor:
        """As `Denoiser.forward`."""
        return self.base(noisy, timestep, encoded)

    def guided(
        self, noisy: Tensor, timestep: Tensor, encoded: Tensor, null: Tensor | None, scale: float, memory: dict[str, Any]
    ) -> Tensor:  # fmt: skip
        """As `Denoiser.guided`, of what this guard says."""
        return Denoiser.guided(self, noisy, timestep, encoded, null, scale, memory)  # type: ignore[arg-type]


def written(model: Any, concept: str) -> Tensor:
    """(1, L) or (1,) a concept as a condition: a class id, or words as a prompt of their own, of "red | crimson" both."""
    if model.kind == "text":
        prompt = " ".join(part.strip() for part in concept.split("|"))
        model.conditions.words(prompt)  # what the tokenizer cannot write is refused
        return model.conditions.of(prompt)
    return model.conditions.of([model.conditions.number(concept)])


class ConceptGuidance(GuardedDenoiser):
    """A guard that knows one concept's condition and acts in guidance."""

    def __init__(self, base: nn.Module, concept: str):
        super().__init__(base)
        self.concept = concept
        self.condition = written(base, concept)

    def told(self, count: int, memory: dict[str, Any]) -> Tensor:
        """The encoded concept for `count` rows, encoded once a sampling."""
        if "concept" not in memory:
            memory["concept"] = self.encode(self.condition)
        return memory["concept"].expand(count, *memory["concept"].shape[1:])

    def about(self) -> dict[str, Any]:
        return {"concept": self.concept}


class NegativePrompt(ConceptGuidance):
    """o_S + w (o_p - o_S): a negative prompt. Without guidance (w = 1) it says what the base says."""

    saved_as = "negative_prompt"

    def guided(
        self, noisy: Tensor, timestep: Tensor, encoded: Tensor, null: Tensor | None, scale: float, memory: dict[str, Any]
    ) -> Tensor:  # fmt: skip
        start = None if null is None else self.told(len(noisy), memory)
        return super().guided(noisy, timestep, encoded, start, scale, memory)

    @classmethod
    def rebuilt(cls, base: nn.Module, about: dict[str, Any], tensors: dict[str, Tensor]) -> NegativePrompt:
        return cls(base, about["concept"])


@dataclass(frozen=True)
class Safety:
    """Settings of safe guidance: (delta, s_S, lambda, s_m, beta) of the paper.

    warm_up: sampling steps, counted from 0, that are left as they are. scale: of the distance to the concept. threshold: differences
    of noise at or above it (away from the concept) are left alone. momentum, decay: how much of the past's direction is added, and
    how much of it is kept.
    """

    warm_up: int = 10
    scale: float = 1000.0
    threshold: float = 0.01
    momentum: float = 0.3
    decay: float = 0.4

    def turned(
        self, away: Tensor, guidance: Tensor, towards: Tensor, past: Tensor | float, step: int
    ) -> tuple[Tensor, Tensor]:
        """(guidance with what leads to the concept taken off, the next past).

        away: e_p - e_S in noise. guidance: e_p - e_0. towards: e_S - e_0. step: the sampling step's index, not its timestep."""
        share = torch.where(away < self.threshold, (away.abs() * self.scale).clamp(max=1), 0.0)
        gamma = share * towards + self.momentum * past
        kept = self.decay * past + (1 - self.decay) * gamma
        return (guidance - gamma if step >= self.warm_up else guidance), kept


PRESETS = {
    "weak": Safety(15, 200, 0.0, 0.0, 0.0),
    "medium": Safety(10, 1000, 0.01, 0.3, 0.4),
    "strong": Safety(7, 2000, 0.025, 0.5, 0.7),
    "max": Safety(0, 5000, 1.0, 0.5, 0.7),
}
"""The paper's four configurations, for 50 steps."""


class SafeGuidance(ConceptGuidance):
    """o_0 + w (o_p - o_0 - gamma), see `Safety`. The differences that are compared with the threshold are of noise, whatever the
    network predicts. It acts at w = 1 as well, where the official pipeline has no guidance and does nothing."""

    saved_as = "safe_guidance"

    def __init__(self, base: nn.Module, concept: str, safety: Safety):
        super().__init__(base, concept)
        self.safety = safety

    def guided(
        self, noisy: Tensor, timestep: Tensor, encoded: Tensor, null: Tensor | None, scale: float, memory: dict[str, Any]
    ) -> Tensor:  # fmt: skip
        count = len(noisy)
        if null is None:
            null = self.encode(self.conditions.like(self.condition.expand(count, *self.condition.shape[1:])))
        every = self(torch.cat([noisy] * 3), timestep if timestep.dim() == 0 else timestep.repeat(3),
                     torch.cat([null, encoded, self.told(count, memory)]))  # fmt: skip
        free, asked, concept = every.chunk(3)
        away = self.to_noise(noisy, timestep, asked) - self.to_noise(noisy, timestep, concept)
        guidance, memory["momentum"] = self.safety.turned(
            away, asked - free, concept - free, memory.get("momentum", 0.0), memory["step"]
        )
        return free + scale * guidance

    def about(self) -> dict[str, Any]:
        return {"concept": self.concept, "safety": asdict(self.safety)}

    @classmethod
    def rebuilt(cls, base: nn.Module, about: dict[str, Any], tensors: dict[str, Tensor]) -> SafeGuidance:
        return cls(base, about["concept"], Safety(**about["safety"]))


def softened(columns: Tensor, alpha: float) -> Tensor:
    """X (d, m) with every singular value s made s exp(-alpha s): what its columns have in common goes, the rest stays."""
    left, values, right = torch.linalg.svd(columns.float(), full_matrices=False)
    return ((left * (values * torch.exp(-alpha * values))) @ right).to(columns)


class SoftEndTokens(GuardedDenoiser):
    """Embeddings of the concept's tokens and of all positions from the end token on are softened, in prompts that hold the concept,
    once `start` of the sampling is over. `encoded` is the prompt's own embeddings followed by the softened ones, (B, 2 L, d); outside
    of a sampling (a loss) timesteps stand for its steps."""

    saved_as = "soft_end_tokens"

    def __init__(self, base: nn.Module, concept: str, alpha: float = 1.0, start: float = 0.2):
        super().__init__(base)
        cross_attention(base, "seot")
        positions_of(self.conditions, self.conditions.of("")[0], concept)  # what the tokenizer cannot write is refused
        self.concept, self.alpha, self.start = concept, alpha, start

    def columns(self, row: Tensor, ahead: int = 0) -> list[int]:
        """Positions that are softened in a prompt (L,) with `ahead` more tokens before it; none where the concept is not in it."""
        target = positions_of(self.conditions, row, self.concept)
        every = [*target, *range(end_of(self.conditions, row), len(row))] if target else []
        return [p + ahead for p in every if p + ahead < len(row)]

    def encode(self, condition: Tensor, prefix: Tensor | None = None, words: Tensor | None = None) -> Tensor:
        own = super().encode(condition, prefix, words)
        ahead = 0 if prefix is None else prefix.shape[-2]
        rows = []
        for states, ids in zip(own, condition, strict=True):
            chosen = self.columns(ids, ahead)
            rows.append(states.index_copy(0, torch.tensor(chosen, device=states.device),
                                          softened(states[chosen].T, self.alpha).T) if chosen else states)  # fmt: skip
        return torch.cat([own, torch.stack(rows)], 1)

    def forward(self, noisy: Tensor, timestep: Tensor, encoded: Tensor) -> Tensor:
        own, soft = encoded.chunk(2, 1)
        late = timestep.to(encoded.device).reshape(-1, 1, 1) <= (1 - self.start) * self.horizon
        return self.base(noisy, timestep, torch.where(late, soft, own))

    def guided(
        self, noisy: Tensor, timestep: Tensor, encoded: Tensor, null: Tensor | None, scale: float, memory: dict[str, Any]
    ) -> Tensor:  # fmt: skip
        half = int(memory["step"] >= self.start * memory["total"])
        free = None if null is None else null.chunk(2, 1)[half]
        return self.base.guided(noisy, timestep, encoded.chunk(2, 1)[half], free, scale, memory)  # type: ignore[operator]

    def about(self) -> dict[str, Any]:
        return {"concept": self.concept, "alpha": self.alpha, "start": self.start}

    @classmethod
    def rebuilt(cls, base: nn.Module, about: dict[str, Any], tensors: dict[str, Tensor]) -> SoftEndTokens:
        return cls(base, **about)
