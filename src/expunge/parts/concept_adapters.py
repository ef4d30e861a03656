"""SPM's membranes: thin adapters on a denoising network, one for each concept, let through as far as a prompt is about it.

    y = W x + sum_k m_k (alpha / r) U_k D_k x        on every Linear and Conv of the network's transformer blocks; U_k = 0 at first
    m_k = max( cos(prompt's embeddings, concept's),  share of the concept's tokens that the prompt holds )      all positions flattened

Lyu et al., "One-dimensional Adapter to Rule Them All", CVPR 2024, 2312.16145 ("facilitated transport" is m). The base's weights are never
touched, and where m is 0 its output is its own bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import BadModel
from expunge.parts.attention_maps import cross_attention
from expunge.parts.guarded_diffusion import GuardedDenoiser, written
from expunge.tasks.base import evaluating


def adapted_layers(model: Any) -> dict[str, nn.Module]:
    """Every Linear and Conv2d inside the network's transformer blocks (with their projections in and out), by name."""
    blocks = [name for name, m in model.network.named_modules() if type(m).__name__ == "Transformer2DModel"]
    return {
        name: m for name, m in model.network.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and any(name.startswith(f"{block}.") for block in blocks)
    }  # fmt: skip


class Adapter(nn.Module):
    """Down and up matrices of every layer, in order: (r, in, *kernel) and (out, r)."""

    def __init__(self, layers: Sequence[nn.Module], rank: int, rng: torch.Generator):
        super().__init__()
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for layer in layers:
            weight: Any = layer.weight
            bound = (3 / weight[0].numel()) ** 0.5  # Kaiming's uniform, a = 1, as the released code's
            self.down.append(nn.Parameter((torch.rand(rank, *weight.shape[1:], generator=rng) * 2 - 1) * bound))
            self.up.append(nn.Parameter(torch.zeros(len(weight), rank)))

    def added(self, number: int, layer: nn.Module, x: Tensor) -> Tensor:
        """U D x of one layer, shaped as its output."""
        down, up = self.down[number].to(x), self.up[number].to(x)
        if isinstance(layer, nn.Conv2d):
            low = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
            return F.conv2d(low, up[:, :, None, None])
        return F.linear(F.linear(x, down), up)


class ConceptAdapters(GuardedDenoiser):
    """concepts: words, of which "red | crimson" are two ways to say one. alpha: of the scale alpha / rank. gate: let each adapter through
    by its prompt; False while one is trained (m = 1). strength: of all of them.

    With a gate `encoded` has one row more than the base's, which holds the multipliers: (B, L + 1, d).
    """

    saved_as = "concept_adapters"

    def __init__(
        self, base: nn.Module, concepts: Sequence[str], rank: int = 1, alpha: float = 1.0, seed: int = 0, gate: bool = True,
        strength: float = 1.0,
    ):  # fmt: skip
        super().__init__(base)
        cross_attention(base, "spm")
        self.concepts, self.rank, self.alpha = tuple(concepts), rank, alpha
        self.gate, self.strength = gate, strength
        layers, rng = list(adapted_layers(base).values()), torch.Generator().manual_seed(seed)
        self.adapters = nn.ModuleList(Adapter(layers, rank, rng) for _ in concepts).to(base.device)  # type: ignore[arg-type]
        self.ways = [[written(base, words.strip()) for words in concept.split("|")] for concept in self.concepts]

    # -- how much of each adapter --------------------------------------------------------------------------------------
    def multipliers(self, condition: Tensor, own: Tensor) -> Tensor:
        """(B, K) in [0, 1] for prompts (B, L) with embeddings (B, L, d); a negative cosine counts as 0."""
        columns = []
        for ways in self.ways:
            found = []
            for ids in ways:
                with evaluating(self.base):
                    concept = self.base.encode(ids)  # type: ignore[operator]
                cosine = F.cosine_similarity(own.detach().flatten(1), concept.flatten(1))
                tokens = set(self.conditions.content(ids[0]))
                held = [len(tokens & set(self.conditions.content(row))) / len(tokens) for row in condition.cpu()]
                found.append(torch.maximum(cosine, torch.tensor(held).to(cosine)))
            columns.append(torch.stack(found).amax(0))
        return torch.stack(columns, 1).clamp(0, 1)

    def encode(self, condition: Tensor, prefix: Tensor | None = None, words: Tensor | None = None) -> Tensor:
        own = super().encode(condition, prefix, words)
        if not self.gate:
            return own
        row = own.new_zeros(len(own), 1, own.shape[-1])
        row[:, 0, : len(self.concepts)] = self.multipliers(condition, own)
        return torch.cat([own, row], 1)

    def forward(self, noisy: Tensor, timestep: Tensor, encoded: Tensor) -> Tensor:
        if self.gate:
            encoded, told = encoded[:, :-1], encoded[:, -1, : len(self.concepts)]
        else:
            told = encoded.new_ones(len(encoded), len(self.concepts))
        with self.let_through(told * self.strength):
            return self.base(noisy, timestep, encoded)

    def guided(
        self, noisy: Tensor, timestep: Tensor, encoded: Tensor, null: Tensor | None, scale: float, memory: dict[str, Any]
    ) -> Tensor:  # fmt: skip
        if null is not None and self.gate:  # one network for both halves, as released: the prompt's multipliers
            null = torch.cat([null[:, :-1], encoded[:, -1:]], 1)
        return super().guided(noisy, timestep, encoded, null, scale, memory)

    @contextmanager
    def let_through(self, multipliers: Tensor) -> Iterator[None]:
        """Within it the base's layers add what the adapters say, by (B, K) multipliers."""
        open_ = [k for k in range(multipliers.shape[1]) if bool(multipliers[:, k].any())]

        def hook(number: int) -> Any:
            def add(layer: nn.Module, inputs: Any, result: Tensor) -> Tensor:
                for k in open_:
                    factor = (multipliers[:, k] * (self.alpha / self.rank)).to(result)
                    shaped = factor.reshape(-1, *[1] * (result.dim() - 1))
                    result = result + shaped * self.adapters[k].added(number, layer, inputs[0])  # type: ignore[operator]
                return result

            return add

        layers = list(adapted_layers(self.base).values()) if open_ else []
        handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- files -----------------------------------------------------------------------------------------------------
    def about(self) -> dict[str, Any]:
        return {"concepts": list(self.concepts), "rank": self.rank, "alpha": self.alpha, "strength": self.strength}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.adapters.state_dict())

    @classmethod
    def rebuilt(cls, base: nn.Module, about: dict[str, Any], tensors: dict[str, Tensor]) -> ConceptAdapters:
        guard = cls(base, about["concepts"], about["rank"], about["alpha"], strength=about["strength"])
        own = guard.adapters.state_dict()
        if own.keys() != tensors.keys() or any(own[k].shape != tensors[k].shape for k in own):
            raise BadModel("expected the adapters of this base's layers, found others; run the method again")
        guard.adapters.load_state_dict(tensors)
        return guard
