"""The head of a causal language model in pieces: the logits of many positions are never in memory together.

A model is run once for its last states (B, L, d) at the positions that matter; logits are made from them on demand, `chunk`
positions at a time, and a piece that needs a gradient is made again in the backward pass (`torch.utils.checkpoint`). So
neither direction holds more than a few times chunk x vocabulary numbers, where the whole is batch x length x vocabulary.

What a model does after its head (soft caps, scales) is its own business: logits are made by the model's own forward, whose
decoder answers with the given states. Whether a model can be asked in this way is tried once, on two tokens; where it
cannot (no decoder apart from the head, a head that reads more than the last states), its logits are made whole as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expunge.errors import UnmetNeed
from expunge.tasks.base import Output

NUMBERS = 2**25
"""Logits in a piece where the task does not say: 128 MiB in float32 whatever the vocabulary."""

_able: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Pieces(Output):
    """An output whose logits are made on demand.

    states: (B, L, d), what the head reads. model: whose head it is. chunk: positions per piece; None: `NUMBERS` logits.
    `prediction` is (B, L, V) as in any output, in full for whoever asks; `mapped` is for those who can do without.
    """

    states: Tensor
    model: nn.Module
    chunk: int
    within: Callable[[], Any]
    whole: Tensor | None
    kept: tuple[Tensor, Tensor] | None

    def __init__(
        self, states: Tensor, model: nn.Module, chunk: int | None, extra: Mapping[str, Any] | None = None,
        within: Callable[[], Any] = nullcontext,
    ):  # fmt: skip
        size = chunk or max(NUMBERS // _vocabulary(model), 1)
        own = {"states": states, "model": model, "chunk": size, "extra": extra or {}, "within": within}
        for name, value in {**own, "whole": None, "kept": None}.items():
            object.__setattr__(self, name, value)  # the base is frozen

    @property
    def prediction(self) -> Tensor:  # type: ignore[override]
        found = self.logits(self.states) if self.whole is None else self.whole
        object.__setattr__(self, "whole", found)
        return found

    def logits(self, states: Tensor) -> Tensor:
        """(..., V) of states (..., d)."""
        with self.within():
            return logits_of(self.model, states) if states.dim() == 3 else logits_of(self.model, states[None])[0]

    def changed(self, **changes: Any) -> Pieces:
        own = {name: getattr(self, name) for name in ("states", "model", "chunk", "extra", "within")}
        return Pieces(**{**own, **changes})

    def detach(self) -> Pieces:
        return self.changed(states=self.states.detach())

    def part(self, rows: slice, extra: Mapping[str, Any]) -> Pieces:
        return self.changed(states=self.states[rows], extra=extra)

    def under(self, within: Callable[[], Any]) -> Pieces:
        return self.changed(within=within)


def mapped(function: Callable[..., Tensor], outputs: Sequence[Output], filled: Tensor, answers: Tensor) -> Tensor:
    """`function(logits (N, V), answers (N,)[, other logits (N, V)])` over all N positions that are `filled` (B, L).

    outputs: the model's, and where the function takes it, the other's. What fits in one piece is made once and kept for the
    backward pass; several pieces are made again there.
    """
    size = min((o.chunk for o in outputs if isinstance(o, Pieces)), default=len(answers))
    if len(answers) <= size:
        logits = [_widened(_whole(o, filled)) for o in outputs]
        return function(logits[0], answers, *logits[1:])

    def piece(own: Tensor, *some: Tensor) -> Tensor:
        found = [_widened(o.logits(x) if isinstance(o, Pieces) else x) for o, x in zip(outputs, some, strict=True)]
        return function(found[0], own, *found[1:])

    inputs = [(o.states if isinstance(o, Pieces) else o.prediction)[:, : filled.shape[1]][filled] for o in outputs]
    parts = []
    for own, *some in zip(answers.split(size), *(x.split(size) for x in inputs), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(piece, own, *some, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(piece(own, *some))
    return torch.cat(parts)


def _whole(output: Output, filled: Tensor) -> Tensor:
    """(N, V) logits, made once for all that read the same output at the same positions."""
    if not isinstance(output, Pieces):
        return output.prediction[:, : filled.shape[1]][filled]
    if output.kept is not None and torch.equal(output.kept[0], filled):
        return output.kept[1]
    logits = output.logits(output.states[:, : filled.shape[1]][filled])
    object.__setattr__(output, "kept", (filled, logits))
    return logits


def _widened(logits: Tensor) -> Tensor:
    """Logits in at least float32, where sums over a vocabulary are taken."""
    return logits if logits.dtype == torch.float64 else logits.float()


# -- asking a model ----------------------------------------------------------------------------------------------------
def states_at(model: nn.Module, where: Tensor, shape: torch.Size, call: Callable[[], Any]) -> Tensor:
    """(B, L, d) what the head reads at positions `where` (B, L). call: runs the model on its (B, T) inputs of this shape;
    its own head gets nothing to do."""
    seen: list[Tensor] = []

    def pick(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states = inputs[0]
        if states.shape[:2] != shape:
            return inputs
        seen.append(states.gather(1, where[..., None].expand(*where.shape, states.shape[-1])))
        return (states[:, :0], *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)  # type: ignore[operator]
    try:
        call()
    finally:
        hook.remove()
    return seen[0]


def logits_of(model: nn.Module, states: Tensor) -> Tensor:
    """(B, L, V) the model's logits from its last states (B, L, d), with whatever it does after its head."""
    with _answering(model, states):
        keywords = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        return model(input_ids=ids, use_cache=False, **keywords).logits  # type: ignore[union-attr]


def splits_off(model: nn.Module) -> bool:
    """Whether `logits_of` gives the model's logits; tried once for each model."""
    if model not in _able:
        _able[model] = _try(model)
    return _able[model]


@torch.no_grad()
def _try(model: nn.Module) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not hasattr(model, "config") or _decoder(model) in (None, model):
        return False
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    ids = torch.zeros((1, 2), dtype=torch.int64, device=head.weight.device)
    try:
        whole = model(input_ids=ids, use_cache=False).logits
        own = logits_of(model, seen[0])
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False
    finally:
        hook.remove()
    return own.shape == whole.shape and torch.allclose(own.float(), whole.float(), rtol=1e-4, atol=1e-4)


def _decoder(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_decoder", lambda: None)()


class _Answer(dict):
    """What a decoder returns, as much of it as a head may read; all else is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self.get("last_hidden_state") if key == 0 else self.get(key)


@contextmanager
def _answering(model: nn.Module, states: Tensor):
    """The model's decoder answers with `states` instead of running."""
    decoder = _decoder(model)
    assert decoder is not None
    before = decoder.__dict__.get("forward")
    decoder.forward = lambda *_, **__: _Answer(last_hidden_state=states)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before  # type: ignore[method-assign]


@contextmanager
def recomputing(model: nn.Module):
    """Blocks of a model of transformers keep no activations for the backward pass (in train mode), but run again there.

    A block with hooks is left out: they would be gone, or others, when it runs again (latent attacks, steering).
    """
    name = next(
        (n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(model, f"{n}_enable")), None
    )
    if name is None:
        raise UnmetNeed(
            f"expected a model of transformers for gradient checkpointing, found {type(model).__name__}; "
            "use Language(gradient_checkpointing=False)"
        )
    # transformers 6 keeps only the first of the two names
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    for block in model.modules():
        if getattr(block, "gradient_checkpointing", False) and any(map(_hooked, block.modules())):
            block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()


def _hooked(module: nn.Module) -> bool:
    own = 1 if hasattr(module, "_get_fsdp_state") else 0  # a sharded block's own pair, which knows how to run again
    return len(module._forward_pre_hooks) > own or len(module._forward_hooks) > own


def _vocabulary(model: nn.Module) -> int:
    return int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
