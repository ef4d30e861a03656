"""A second network that plays against the model (or for it) in the same loop, with terms and an optimizer of its own.

A discriminator, a fake score, an assistant. In every update of a plan the player makes `steps` updates of its own network, then
the terms of the plan move the model; neither moves the other's weights. For two players of gains f and g,

    phi <- phi - lr_phi grad_phi g(theta, phi)   (steps times),     theta <- theta - lr_theta grad_theta f(theta, phi)

which finds the saddle of a convex-concave game where one exists (Goodfellow et al., 2014, 1406.2661, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from expunge.errors import BadSetting
from expunge.parts.adversaries import Adversary
from expunge.parts.plan import Optimizer, Plan, Term


@dataclass(frozen=True)
class Player(Adversary):
    """See the module's text and `player`."""

    name: str
    terms: tuple[Term, ...]
    network: str | Callable[[Any, int], nn.Module]
    optimizer: Optimizer = Optimizer("adam", lr=1e-3)
    steps: int = 1
    every: int = 1
    warm_up: int = 0
    after: bool = False
    mode: str = "train"
    space = "network"

    def __post_init__(self) -> None:
        if not self.terms:
            raise BadSetting(f"expected terms for the player '{self.name}', found none; pass what it minimises")
        if self.steps < 1 or self.every < 1 or self.warm_up < 0:
            raise BadSetting(
                f"expected steps >= 1, every >= 1 and warm_up >= 0, found {self.steps}, {self.every} and {self.warm_up}; "
                "correct them"
            )
        if self.name == "model":
            raise BadSetting("expected a player's own name, found 'model', which is the network of the plan; rename it")

    @property
    def part(self) -> str | None:
        """The submodule of the network under training that the player moves; None: it has a network of its own."""
        return self.network if isinstance(self.network, str) else None

    def owns(self, parameter: str) -> bool:
        """Whether a parameter of the network under training is the player's to move."""
        return self.part is not None and parameter.removeprefix("base_model.model.").startswith(f"{self.part}.")

    def on_split(self, name: str) -> Player:
        """The same player with all its terms on another split."""
        return replace(self, terms=tuple(replace(term, on=name) for term in self.terms))

    def __str__(self) -> str:
        how = [f"{self.steps} steps"] if self.steps > 1 else []
        how += [f"every {self.every}"] if self.every > 1 else []
        how += [f"{self.warm_up} to warm up"] if self.warm_up else []
        text = f"{self.name}: min {' + '.join(map(str, self.terms))} by {self.optimizer}"
        return f"({', '.join([text, *how])})"


def player(
    name: str,
    *terms: Term,
    network: str | Callable[[Any, int], nn.Module],
    optimizer: Optimizer | None = None,
    steps: int = 1,
    every: int = 1,
    warm_up: int = 0,
    after: bool = False,
    mode: str = "train",
) -> Player:
    """A second network for `Plan(adversary=...)`.

    name: its key in `step.networks`. terms: what it minimises, on any split of the case.
    network: a function (case, seed) -> nn.Module (built once, kept in the run's networks, so that a later phase's player of the
        same name goes on with it), or the name of a submodule of the network under training ("discriminator").
    steps: its updates per update of the model, each on further rows. every: it plays at every so many updates of the model.
    warm_up: its updates before the model's first. after: it plays after the model's update instead of before.
    mode: "train" or "eval", of its network throughout the phase.

    In its terms `step.model` is its own network (for a submodule: the whole network), `step.networks["model"]` the other's.
    """
    return Player(name, terms, network, optimizer or Optimizer("adam", lr=1e-3), steps, every, warm_up, after, mode)


def players_of(plan: Plan) -> tuple[Player, ...]:
    """The players among a plan's adversaries."""
    adversaries = plan.adversary if isinstance(plan.adversary, tuple) else (plan.adversary,)
    return tuple(a for a in adversaries if isinstance(a, Player))
