"""Scope: a few experts of a mixture-of-experts model, those that the forget rows use most, and their layers' routers.

SEUF / UOE (2411.18797): with ordinary unlearning the router sends the forget tokens elsewhere and the damage spreads; the
most used expert alone is a fraction of a percent of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from expunge.errors import BadSetting
from expunge.parts.mixture import affinities, mixture_named, most_used
from expunge.parts.scopes.base import Mask, Scope
from expunge.seeds import generator


@dataclass(frozen=True)
class Experts(Scope):
    """chosen: (layer, expert) pairs; none: the `top` with the highest affinity to at most `rows` forget rows."""

    top: int = 1
    chosen: tuple[tuple[str, int], ...] = ()
    rows: int = 256
    router: bool = True

    def __post_init__(self) -> None:
        if self.top < 1:
            raise BadSetting(f"expected top >= 1 experts, found {self.top}; correct it")

    def select(self, workbench: Any) -> Mask:
        model = workbench.model
        mask: Mask = {name: False for name, _ in model.named_parameters()}
        chosen = self.chosen or self._attributed(workbench)
        for name in dict.fromkeys(name for name, _ in chosen):
            layer = mixture_named(model, name)
            numbers = [i for own, i in chosen if own == name]
            if not all(0 <= i < layer.count for i in numbers):
                raise BadSetting(f"expected experts of {name} in 0..{layer.count - 1}, found {numbers}; correct them")
            mask |= layer.parameters_of(model, numbers)
            if self.router:
                mask |= {f"{layer.router}.{n}": True for n, _ in model.get_submodule(layer.router).named_parameters()}
        workbench.note("experts", [f"{name}:{i}" for name, i in chosen])
        return mask

    def _attributed(self, workbench: Any) -> tuple[tuple[str, int], ...]:
        rows = workbench.splits["forget"].sample(self.rows, generator(workbench.seed, "experts"))
        found = affinities(workbench.task, workbench.model, workbench.batches(rows, 32))
        chosen = most_used(found, self.top)
        workbench.note("expert_affinity", [float(found[name][i]) for name, i in chosen])
        return chosen

    def __str__(self) -> str:
        if not self.chosen:
            return f"experts(top {self.top})"
        return f"experts({', '.join(f'{name}:{i}' for name, i in self.chosen)})"


def experts(top: int = 1, chosen: tuple[tuple[str, int], ...] = (), rows: int = 256, router: bool = True) -> Scope:
    """The `top` experts that the forget rows use most (or the `chosen` (layer, expert) pairs), with their routers."""
    return Experts(top, tuple(chosen), rows, router)
