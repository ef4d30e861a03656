"""From the terms of one update to one gradient: through a weight-space adversary where one is set, and through a balance.

Without either, all terms share one backward pass. With an adversary the terms of its split take their gradient where it says;
with a balance every term is a task of its own, and the balance makes one gradient of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expunge.engine.distribution import Distribution, complete, fitted
from expunge.errors import BadSetting
from expunge.parts.adversaries import Adversary
from expunge.parts.balances import Around
from expunge.parts.plan import Plan
from expunge.parts.step import Step


@dataclass
class Gradients:
    """value: (term's place, step) -> (B,), the objective with its prepared memory."""

    plan: Plan
    adversaries: tuple[Adversary, ...]
    distribution: Distribution
    device: torch.device
    value: Callable[[int, Step], Tensor]
    memory: Any = None
    """What the plan's balance prepared."""

    def put(
        self, chosen: list[int], steps: dict[str, Step], parameters: list[Any], weights: dict[str, float],
        factor: dict[int, float], draws: int, rng: Callable[[], torch.Generator], update: int = 0,
    ) -> dict[int, Tensor]:  # fmt: skip
        """Put one gradient into every parameter's `.grad`; return each term's mean loss (before its weight), for `read`.

        weights: split -> what this process's mean counts in the global one. factor: place -> what a term's mean is multiplied
        with. draws: the seed of the update's dropout, the same in every pass. rng: makes a weight-space adversary's generator.
        update: its number, for a balance that does not act in every one.
        """
        terms = self.plan.terms
        losses: dict[int, Tensor] = {}
        hard = [a for a in self.adversaries if a.space == "weights"]
        with self.distribution.autocast():
            if not hard and self.plan.balance is None:
                means = {}
                # A split's graph is gone before the next one's forward pass: activations of one split at a time
                for which in [chosen] if self._tied(chosen, steps) else self._groups(chosen):
                    total: Tensor | None = None
                    for i in which:
                        mean = self.value(i, steps[terms[i].on]).mean()
                        means[i] = mean.detach()
                        weighted = mean if factor[i] == 1.0 else factor[i] * mean
                        total = weighted if total is None else total + weighted
                    if total is not None and parameters and total.requires_grad:
                        total.backward()
                if parameters:
                    self.distribution.reduce([p.grad for p in parameters if p.grad is not None])
                return means

            def take(which: list[int], again: bool) -> list[Tensor]:
                fresh = run_anew(steps) if again else steps
                if again:  # the same dropout in every pass of an adversary
                    seed_draws(draws, self.device)
                value: Any = 0.0
                for i in which:
                    mean = self.value(i, fresh[terms[i].on]).mean()
                    losses.setdefault(i, mean.detach())
                    value = value + factor[i] * mean
                if not parameters or not isinstance(value, Tensor) or not value.requires_grad:
                    return [torch.zeros_like(p) for p in parameters]
                found = self.distribution.gradients(value, parameters, retain_graph=not again)
                if again:
                    let_go(fresh)
                gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
                self.distribution.reduce(gradients)
                return gradients

            groups = self._groups(chosen)
            rows_of: list[list[Tensor]] = []
            for which in groups:
                on = terms[which[0]].on
                attackers = [a for a in hard if a.on == on]
                if len(attackers) > 1:
                    raise BadSetting(
                        f"expected one weight-space adversary for '{on}', found {', '.join(map(str, attackers))}; keep one"
                    )
                if attackers:
                    rows_of.append(attackers[0].gradient(partial(take, which, True), list(parameters), rng()))
                else:
                    rows_of.append(take(which, False))
            if self.plan.balance is None:
                combined = [sum(parts) for parts in zip(*rows_of, strict=True)]
            else:
                matrix = torch.stack([torch.cat([complete(g).reshape(-1) for g in row]) for row in rows_of])
                around = Around(tuple(p.numel() for p in parameters), update, self.memory)
                flat = self.plan.balance.combine(matrix, [terms[w[0]].on for w in groups], around)
                combined, start = [], 0
                for p in parameters:
                    combined.append(fitted(flat[start : start + p.numel()].view(p.shape), p))
                    start += p.numel()
            for p, g in zip(parameters, combined, strict=True):
                p.grad = g.detach() if isinstance(g, Tensor) else torch.zeros_like(p)
        return losses

    def read(self, losses: dict[int, Tensor], weights: dict[str, float]) -> dict[int, float]:
        """`put`'s losses as numbers, over all processes. To read one waits for the device: ask after the optimizer's step, or the
        device stands still while the step is prepared."""
        return {i: self.distribution.mean(float(v), weights[self.plan.terms[i].on]) for i, v in losses.items()}

    def _tied(self, chosen: list[int], steps: dict[str, Step]) -> bool:
        """Whether splits share a graph: they go through the model together, or a term reads another split's step."""
        told = [self.plan.terms[i] for i in chosen]
        return any(steps[t.on].joint is not None or t.objective.beside for t in told)

    def _groups(self, chosen: list[int]) -> list[list[int]]:
        """With a balance every term is a task of its own; without, the terms of one split share a backward pass."""
        if self.plan.balance is not None:
            return [[i] for i in chosen]
        by_split: dict[str, list[int]] = {}
        for i in chosen:
            by_split.setdefault(self.plan.terms[i].on, []).append(i)
        return list(by_split.values())


def seed_draws(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the device in use: that function formats a stack trace at every call for every kind of device that is
    not initialised, which costs more than an update of a small network."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        torch.default_generator.manual_seed(seed)
        torch.cuda.manual_seed_all(seed)
    else:
        torch.manual_seed(seed)


def run_anew(steps: dict[str, Step]) -> dict[str, Step]:
    """The same batches and draws, to be run anew."""
    fresh = {n: s.again() for n, s in steps.items()}
    for step in fresh.values():
        step.peers = fresh
    return fresh


def let_go(steps: dict[str, Step]) -> None:
    """Steps know each other; without this their batches and outputs would stay in memory until Python looks for cycles."""
    for step in steps.values():
        for one in (step, step.clean):
            if one is not None:
                one.peers, one.joint = {}, None
