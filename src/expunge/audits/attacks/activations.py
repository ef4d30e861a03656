"""Inside a causal language model: what every block wrote into the residual stream, and how to read it as words.

    h_0       what enters the first block                    h_l   what leaves block l, before the final norm
    lens      W_U LN_f(h)  over the vocabulary               (logit lens: nostalgebraist, 2020)

Read by hooks on the blocks, not from the list of hidden states that transformers returns: the last entry of that list
already has the final norm applied, and the lens would apply it twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from expunge.errors import UnmetNeed
from expunge.seeds import generator
from expunge.tasks.base import Batch, Output, Task, evaluating, move_to_model
from expunge.tasks.language import answer_index

if TYPE_CHECKING:
    from expunge.cases.data import Split

PLACES = ("block", "after_attention", "attention", "mlp")
"""Where the stream is read: block output h_l; input + attention; what attention wrote; what the MLP wrote."""


@dataclass(frozen=True)
class Decoder:
    """The parts of a causal model that a lens needs. norm: the final one (identity where there is none)."""

    blocks: tuple[nn.Module, ...]
    norm: nn.Module
    head: nn.Module

    def lens(self, h: Tensor) -> Tensor:
        """(..., V) logits of a residual stream (..., d)."""
        return self.head(self.norm(h))


def find_decoder(model: nn.Module) -> Decoder | None:
    """The blocks (the largest ModuleList), the norm that follows them in their owner, and the output head; or None."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    stacks = [
        (owner, child)
        for owner in model.modules()
        for child in owner.children()
        if isinstance(child, nn.ModuleList) and len(child)
    ]
    if not isinstance(head, nn.Module) or not stacks:
        return None
    owner, blocks = max(stacks, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    siblings = list(owner.children())
    after = siblings[siblings.index(blocks) + 1 :]
    norm = next((m for m in after if "norm" in type(m).__name__.lower()), nn.Identity())
    return Decoder(tuple(blocks), norm, head)


def decoder(model: nn.Module) -> Decoder:
    """As `find_decoder`, or `UnmetNeed` with the remedy."""
    found = find_decoder(model)
    if found is None:
        raise UnmetNeed(
            f"expected a causal language model with a list of blocks and an output head, found {type(model).__name__}; "
            "take a guard off first (attacks.unwrapping), or leave the checks of activations out"
        )
    return found


@contextmanager
def watching(model: nn.Module, place: str = "block") -> Iterator[list[Tensor]]:
    """A list that each forward inside refills with one (B, T, d) for each block; `block` starts with h_0."""
    if place not in PLACES:
        raise UnmetNeed(f"expected a place, one of {', '.join(PLACES)}, found '{place}'; use one of them")
    seen: list[Tensor] = []
    entered: dict[int, Tensor] = {}
    blocks, hooks = decoder(model).blocks, []

    def enter(number: int) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            h = given[0] if given else named["hidden_states"]
            entered[number] = h.detach()
            if number == 0:
                seen.clear()
                if place == "block":
                    seen.append(h.detach())

        return hook

    def leave(number: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            out = (output if isinstance(output, Tensor) else output[0]).detach()
            seen.append(entered[number] + out if place == "after_attention" else out)

        return hook

    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(enter(number), with_kwargs=True))
        hooks.append(_part(block, place).register_forward_hook(leave(number)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _part(block: nn.Module, place: str) -> nn.Module:
    """The block itself, its attention or its MLP, by the names that libraries give them."""
    if place == "block":
        return block
    words = ("mlp", "feed_forward", "ffn") if place == "mlp" else ("attn", "attention")
    for name, child in block.named_children():
        if any(word in name.lower() for word in words) and "norm" not in name.lower():
            return child
    raise UnmetNeed(
        f"expected a part named like {' or '.join(words)} in {type(block).__name__}, found "
        f"{', '.join(name for name, _ in block.named_children())}; read the place 'block' instead"
    )


def streams(
    model: nn.Module, task: Task, split: Split, seed: int = 0, batch_size: int = 64, place: str = "block"
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Batch by batch: the batch and the streams (B, T, d) of all blocks, in eval mode without gradients."""
    with evaluating(model), watching(model, place) as seen:
        for number, batch in enumerate(split.batches(batch_size)):
            batch = move_to_model(task.prepare(batch, generator(seed, "attack", split.name, number)), model)
            task.forward(model, batch)
            yield batch, list(seen)


def answer_states(h: Tensor, batch: Batch) -> Tensor:
    """(B, L, d) the states of a stream (B, T, d) from which the answer's tokens are predicted, left-aligned."""
    where = answer_index(batch["labels"])
    return h.gather(1, where[..., None].expand(*where.shape, h.shape[-1]))


def lens_output(parts: Decoder, h: Tensor, batch: Batch) -> Output:
    """What the lens says at the answer's places, as the task's own `Output`: every score of the task can read it."""
    return Output(parts.lens(answer_states(h, batch)))
