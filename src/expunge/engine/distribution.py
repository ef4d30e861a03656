"""Devices, mixed precision and several processes, by accelerate.

Several processes share each batch: process r takes rows r, r+n, r+2n, ... of it and the gradients are averaged with the
weight of their rows, so that n processes make the update that one would. Done on gradients rather than by wrapping the model,
because balances and adversaries take several gradients per update.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


class Distribution:
    """One process on one device unless an accelerator is given."""

    def __init__(self, accelerator: Any = None):
        self.accelerator = accelerator
        self.count = 1 if accelerator is None else int(accelerator.num_processes)
        self.rank = 0 if accelerator is None else int(accelerator.process_index)

    @classmethod
    def make(cls, device: str | None = None, mixed_precision: str | None = None, trackers: list[str] | None = None,
             folder: str | None = None) -> Distribution:  # fmt: skip
        """By accelerate's own rules (environment, launch command). device="cpu" forces the CPU."""
        from accelerate import Accelerator

        return cls(
            Accelerator(
                cpu=device == "cpu",
                mixed_precision=mixed_precision or "no",
                log_with=trackers or None,
                project_dir=folder,
            )
        )

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.accelerator is None else self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> Any:
        """Mixed precision, where it was asked for."""
        if self.accelerator is None or self.accelerator.mixed_precision == "no":
            return contextlib.nullcontext()
        return self.accelerator.autocast()

    def mine(self, ids: Tensor) -> Tensor:
        """This process's rows of a batch."""
        if self.count == 1:
            return ids
        own = ids[self.rank :: self.count]
        return own if len(own) else ids[:1]  # a batch smaller than the process count: weight 0, see local_weights

    def local_weights(self, sizes: dict[str, int]) -> dict[str, float]:
        """What a local batch mean counts in the global one, times the process count (the reduction takes the mean)."""
        if self.count == 1:
            return dict.fromkeys(sizes, 1.0)
        return {n: len(range(self.rank, size, self.count)) * self.count / size for n, size in sizes.items()}

    def reduce(self, gradients: list[Tensor]) -> None:
        """Average in place over the processes."""
        if self.count > 1:
            for g in gradients:
                g.copy_(self.accelerator.reduce(g, reduction="mean"))

    def mean(self, value: float, weight: float) -> float:
        """The global mean of a local batch mean."""
        if self.count == 1:
            return value
        local = torch.tensor(
            value * weight, device=self.device, dtype=torch.float64 if self.device.type == "cpu" else None
        )
        return float(self.accelerator.reduce(local, reduction="mean"))
