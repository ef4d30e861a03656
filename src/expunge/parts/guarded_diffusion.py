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
from expunge.parts.attention_maps import attention_maps, cross_attention, end_of, positions_of
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


@dataclass(frozen=True)
class Seen:
    """What a network looks at, mean over the heads and layers of one resolution: words (B, pixels, tokens), itself (B, pixels,
    pixels), rows over the second dimension."""

    words: Tensor
    itself: Tensor

    @classmethod
    def of(cls, maps: dict[str, Tensor], pixels: float) -> Seen:
        """Of the layers whose number of pixels is nearest to `pixels`."""
        size = min({found.shape[2] for found in maps.values()}, key=lambda count: abs(count - pixels))
        at = {name: found.float().mean(1) for name, found in maps.items() if found.shape[2] == size}
        return cls(
            *(torch.stack([m for name, m in at.items() if name.endswith(k)]).mean(0) for k in ("attn2", "attn1"))
        )

    def moved(self, before: Seen, role: Tensor) -> Tensor:
        """(B,) eq. 5-8: sum over tokens of role times (1 - cos) of their maps, and of the self-attention to the pixels of each
        token's mask; small where what has a positive role (B, tokens) stayed and what has a negative one moved.

        A mask holds the pixels whose share of the token, `before`, is at least 0.85 (negative role) or 0.95 of the largest."""
        tokens = 1 - torch.cosine_similarity(self.words, before.words, dim=1)
        peaks = before.words / before.words.amax(1, keepdim=True)
        weight = (peaks >= torch.where(role < 0, 0.85, 0.95)[:, None]) * role[:, None]
        pixels = 1 - torch.cosine_similarity(self.itself, before.itself, dim=1)
        return (role * tokens).sum(1) + (weight.sum(2) * pixels).sum(1)


class SoftEndTokens(GuardedDenoiser):
    """Embeddings of the concept's tokens and of all positions from the end token on are softened, in prompts that hold the concept,
    once `start` of the sampling is over; until `until` of it is over they then take `iterations` steps of gradient at every step of
    the sampling, down `Seen.moved` from what the bare model looks at on its own way from the same noise.

    `encoded` is the prompt's own embeddings, the softened ones and, with iterations, each position's role: (B, 2 L or 3 L, d). Outside
    of a sampling (a loss) timesteps stand for its steps, and nothing is optimised.
    """

    saved_as = "soft_end_tokens"
    spared, suppressed, rate = 1.0, -0.5, 20.0
    """lambda_r, lambda_e, and the step size for generated images."""

    def __init__(
        self, base: nn.Module, concept: str, alpha: float = 1.0, start: float = 0.2, iterations: int = 0, until: float = 0.4
    ):  # fmt: skip
        super().__init__(base)
        cross_attention(base, "seot")
        positions_of(self.conditions, self.conditions.of("")[0], concept)  # what the tokenizer cannot write is refused
        self.concept, self.alpha, self.start, self.iterations, self.until = concept, alpha, start, iterations, until

    def positions(self, row: Tensor, ahead: int = 0) -> tuple[list[int], list[int], list[int]]:
        """Positions of the concept's tokens, of the other words, and from the end token on, in a prompt (L,) with `ahead` more tokens
        before it; none where the concept is not in it."""
        target, end = positions_of(self.conditions, row, self.concept), end_of(self.conditions, row)
        others = [p for p in range(1, end) if p not in target] if target else []
        every = (target, others, list(range(end, len(row))) if target else [])
        told, rest, ends = ([p + ahead for p in some if p + ahead < len(row)] for some in every)
        return told, rest, ends

    def encode(self, condition: Tensor, prefix: Tensor | None = None, words: Tensor | None = None) -> Tensor:
        own = super().encode(condition, prefix, words)
        soft, role = own.clone(), torch.zeros_like(own)
        for number, ids in enumerate(condition):
            told, rest, ends = self.positions(ids, 0 if prefix is None else prefix.shape[-2])
            chosen = torch.tensor(told + ends, dtype=torch.long, device=own.device)
            if len(chosen):
                soft[number] = own[number].index_copy(0, chosen, softened(own[number, chosen].T, self.alpha).T)
            role[number, told], role[number, rest] = self.suppressed, self.spared
        return torch.cat([own, soft, role] if self.iterations else [own, soft], 1)

    def versions(self, encoded: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(own, softened, roles (B, tokens) or None) of what `encode` gave."""
        own, soft, *role = encoded.chunk(3 if self.iterations else 2, 1)
        return own, soft, role[0][..., 0] if role else None

    def forward(self, noisy: Tensor, timestep: Tensor, encoded: Tensor) -> Tensor:
        own, soft, _ = self.versions(encoded)
        late = timestep.to(encoded.device).reshape(-1, 1, 1) <= (1 - self.start) * self.horizon
        return self.base(noisy, timestep, torch.where(late, soft, own))

    def guided(
        self, noisy: Tensor, timestep: Tensor, encoded: Tensor, null: Tensor | None, scale: float, memory: dict[str, Any]
    ) -> Tensor:  # fmt: skip
        own, soft, role = self.versions(encoded)
        late, step, total = memory["step"] >= self.start * memory["total"], memory["step"], memory["total"]
        free = None if null is None else self.versions(null)[int(late)]
        if late and role is not None and bool(role.any()) and step < self.until * total:
            if "source" not in memory:
                memory["source"] = memory["trajectory"].fork()  # until now the two went the same way
            source = memory["source"]
            rate = self.rate * (1 - 0.9 * step / max(total - 1, 1)) ** 0.5
            soft = self.optimised(noisy, source.given(timestep), timestep, own, soft, role, rate)
            source.advance(self.base.guided(source.given(timestep), timestep, own, free, scale, memory), timestep)  # type: ignore[operator]
        return self.base.guided(noisy, timestep, soft if late else own, free, scale, memory)  # type: ignore[operator]

    def optimised(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, own: Tensor, soft: Tensor, role: Tensor, rate: float
    ) -> Tensor:  # fmt: skip
        """Softened embeddings after their steps of gradient; rows without the concept have no role and stay."""
        pixels = noisy[0, 0].numel() / 16  # 16 x 16 of Stable Diffusion's 64 x 64
        with torch.enable_grad(), attention_maps(self.base, own=True) as maps:
            with torch.no_grad():
                self.base(source, timestep, own)
            before = Seen.of(maps, pixels)
            for _ in range(self.iterations):
                soft = soft.detach().requires_grad_()
                self.base(noisy, timestep, soft)
                (gradient,) = torch.autograd.grad(Seen.of(maps, pixels).moved(before, role).sum(), soft)
                soft = soft - rate * gradient
        return soft.detach()

    def about(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("concept", "alpha", "start", "iterations", "until")}

    @classmethod
    def rebuilt(cls, base: nn.Module, about: dict[str, Any], tensors: dict[str, Tensor]) -> SoftEndTokens:
        return cls(base, **about)
