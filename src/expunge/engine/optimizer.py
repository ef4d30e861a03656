"""The masked optimizer step: what is outside the scope stays as it is, bit for bit.

Masking the gradient is not enough: weight decay and momentum move weights whose gradient is zero. After each step the
weights outside the mask are restored and their optimizer state is cleared.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from expunge.engine.distribution import fitted
from expunge.errors import BadSetting, need_extra
from expunge.parts.plan import Optimizer
from expunge.parts.scopes.base import Mask

LISTED = 2**26
"""Bytes of weights up to which a step on a CPU takes them as one list."""


@cache
def _fused_on_cpu(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether this torch has the kernel: Adam's since 2.4."""
    if kind is torch.optim.SGD:  # in place in any case
        return False
    try:
        kind([torch.zeros(1, requires_grad=True)], fused=True)  # type: ignore[call-arg]
    except RuntimeError:
        return False
    return True


class MaskedOptimizer:
    """A torch optimizer over the weights that a mask lets move.

    Parameters that are frozen as a whole are left out of the optimizer; partly frozen ones keep a copy to restore from.
    """

    def __init__(self, model: nn.Module, spec: Optimizer, mask: Mask, total_steps: int, steps_per_epoch: int):
        self.spec, self.total_steps, self.steps_per_epoch = spec, max(total_steps, 1), max(steps_per_epoch, 1)
        named = dict(model.named_parameters())
        self.names = [n for n in named if _moves(mask.get(n, False))]
        self.parameters: list[nn.Parameter] = [named[n] for n in self.names]
        self.partial: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for name in self.names:
            m = mask[name]
            if isinstance(m, Tensor) and not bool(m.all()):
                p, live = named[name], fitted(m, named[name])
                self.partial.append((p, live, p.detach().clone()))
        self.inner = self._make() if self.parameters else None
        self.steps = 0
        self.epoch: int | None = None
        """Set by the loop, whose epochs may differ in length (a term that rests after some); else counted from steps."""

    def _make(self) -> torch.optim.Optimizer:
        spec = self.spec
        if spec.name == "sgd":
            return torch.optim.SGD(self.parameters, lr=spec.lr, momentum=spec.momentum, **self._how(torch.optim.SGD))
        if spec.name == "adam":
            return torch.optim.Adam(self.parameters, lr=spec.lr, betas=spec.betas, **self._how(torch.optim.Adam))
        if spec.name == "adamw_8bit":
            kind = _in_8_bits(self.parameters).AdamW8bit
            return kind(self.parameters, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
        decay = spec.weight_decay
        return torch.optim.AdamW(
            self.parameters, lr=spec.lr, betas=spec.betas, weight_decay=decay, **self._how(torch.optim.AdamW)
        )

    def _how(self, kind: type[torch.optim.Optimizer]) -> dict[str, bool]:
        """How a step works through the weights. A list of them spares small models the time between calls, and holds a copy of all
        weights: on CUDA, and for large ones on a CPU, one kernel for each does AdamW's step with no copy at all (Adam's on a CPU)."""
        first, size = self.parameters[0], sum(p.numel() * p.element_size() for p in self.parameters)
        if first.is_cuda or size <= LISTED:
            fused = kind is torch.optim.AdamW and all(p.is_cuda for p in self.parameters)
            return {"fused": True} if fused else {"foreach": len(self.parameters) > 1 and not first.is_meta}
        whole = not any(p.is_meta or hasattr(p, "device_mesh") for p in self.parameters)
        return {"fused": True} if whole and _fused_on_cpu(kind) else {"foreach": False}

    def _decay(self) -> None:
        """Coupled weight decay, gradient += weight_decay * weight, in place: torch's own makes a second set of gradients."""
        if self.spec.weight_decay and self.spec.name in ("sgd", "adam"):
            moving = [p for p in self.parameters if p.grad is not None]
            if moving:
                with torch.no_grad():
                    torch._foreach_add_([p.grad for p in moving], moving, alpha=self.spec.weight_decay)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def rate(self) -> float:
        """The learning rate of the next step."""
        spec, t, total = self.spec, self.steps, self.total_steps
        warm = int(spec.warmup * total)
        if t < warm:
            return spec.lr * (t + 1) / warm
        if spec.schedule == "cosine":
            return spec.lr * 0.5 * (1 + math.cos(math.pi * (t - warm) / max(total - warm, 1)))
        if spec.schedule == "linear":
            return spec.lr * (1 - (t - warm) / max(total - warm, 1))
        if spec.schedule == "steps":
            epoch = t // self.steps_per_epoch if self.epoch is None else self.epoch
            return spec.lr * spec.decay ** sum(epoch >= m for m in spec.milestones)
        return spec.lr

    def step(self) -> None:
        if self.inner is None:
            return
        for p, live, _ in self.partial:
            if p.grad is not None:
                p.grad.mul_(live)
        if self.spec.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.clip)
        if self.spec.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.parameters, self.spec.clip_value)
        if self.spec.schedule != "constant" or self.spec.warmup:
            rate = self.rate()
            for group in self.inner.param_groups:
                group["lr"] = rate
        self._decay()
        self.inner.step()
        if self.partial:
            self._restore()
        self.steps += 1

    @torch.no_grad()
    def _restore(self) -> None:
        """What is outside the mask comes back, and its state is cleared."""
        assert self.inner is not None
        for p, live, before in self.partial:
            p.copy_(torch.where(live, p, before))
            for value in self.inner.state[p].values():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    value.mul_(live)

    # -- state as tensors ------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as named tensors, for a checkpoint."""
        found: dict[str, Tensor] = {}
        if self.inner is not None:
            for name, p in zip(self.names, self.parameters, strict=True):
                for key, value in self.inner.state.get(p, {}).items():
                    if value is not None:
                        found[f"{name}|{key}"] = torch.as_tensor(value).detach()
        return found

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        self.steps = steps
        named = dict(zip(self.names, self.parameters, strict=True))
        for full, value in tensors.items():
            name, key = full.rsplit("|", 1)
            p = named[name]
            assert self.inner is not None
            own = value.clone()
            waits = key == "step" and not self.inner.param_groups[0].get("fused")
            self.inner.state[p][key] = (
                own.cpu() if waits else fitted(own, p) if own.shape == p.shape else own.to(p.device)
            )


def _in_8_bits(parameters: list[nn.Parameter]) -> Any:
    """The library of 8-bit optimizers, which has kernels for CUDA alone."""
    if not all(p.is_cuda for p in parameters):
        raise BadSetting(
            f"expected the model on a CUDA device for adamw_8bit, found it on {parameters[0].device}; use adamw, or device='cuda'"
        )
    return need_extra("bitsandbytes", "cuda")


def _moves(mask: Tensor | bool) -> bool:
    return bool(mask.any()) if isinstance(mask, Tensor) else mask
