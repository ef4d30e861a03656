"""Attention of a denoising network: where it is, where a concept's tokens stand, and what it looks at.

with attention_maps(model) as maps:          # A = softmax(Q K' / sqrt(d)) of every attn2, with its gradient
    model(noisy, timestep, encoded)
maps[name]                                   # (B, heads, pixels, tokens)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from expunge.errors import UnmetNeed


def cross_attention(model: Any, who: str) -> dict[str, Any]:
    """The cross-attention layers of a text-conditional model, by name; UnmetNeed where it has none. who: what asks, for the
    message."""
    found = {
        name: module for name, module in model.named_modules() if name.endswith("attn2") and hasattr(module, "to_k")
    }
    if model.kind != "text" or not found:
        raise UnmetNeed(
            f"expected a text-conditional model with cross-attention for {who}, found a {model.kind}-conditional one"
            f"{'' if found else ' without it'}; use esd, salun_generation or sld"
        )
    return found


def positions_of(conditions: Any, row: Tensor, concept: str) -> list[int]:
    """Where a concept's tokens stand in a prompt (L,), rising; "red | crimson" means either. BadSetting where the tokenizer has
    no token for a part of it."""
    ids, found = row.tolist(), set()
    for words in concept.split("|"):
        target = conditions.words(words)
        for start in range(len(ids) - len(target) + 1):
            if ids[start : start + len(target)] == target:
                found |= set(range(start, start + len(target)))
    return sorted(found)


def end_of(conditions: Any, row: Tensor) -> int:
    """Position of a prompt's first end token; its length where it was cut."""
    ids = row.tolist()
    return ids.index(conditions.tokenizer.eos_token_id, 1) if conditions.tokenizer.eos_token_id in ids[1:] else len(ids)


@contextmanager
def attention_maps(model: Any, own: bool = False) -> Iterator[dict[str, Tensor]]:
    """Within it, every forward leaves the attention probabilities (B, heads, pixels, tokens) of each cross-attention layer, by
    name, with their gradient. They are made again from the layer's own queries and keys, so any attention processor may run.

    own: of the self-attention layers beside them as well (attn1), (B, heads, pixels, pixels)."""
    maps: dict[str, Tensor] = {}
    queries: dict[str, Tensor] = {}

    def watch(name: str, attention: Any) -> list[Any]:
        def query(_module: nn.Module, _inputs: Any, result: Tensor) -> None:
            queries[name] = result

        def key(_module: nn.Module, _inputs: Any, result: Tensor) -> None:
            q, k = (attention.head_to_batch_dim(x) for x in (queries.pop(name), result))
            probabilities = attention.get_attention_scores(q, k)
            maps[name] = probabilities.reshape(len(result), -1, *probabilities.shape[1:])

        return [attention.to_q.register_forward_hook(query), attention.to_k.register_forward_hook(key)]

    layers = cross_attention(model, "attention maps")
    if own:
        beside = {name.removesuffix("attn2") + "attn1" for name in layers}
        layers |= {name: module for name, module in model.named_modules() if name in beside}
    handles = [h for name, module in layers.items() for h in watch(name, module)]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
