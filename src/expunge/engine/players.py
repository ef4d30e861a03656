"""Players at the loop's table: a second network's updates between those of the model, from the same rows and seeds.

Its weights take a gradient in its own turns alone, and the model's none in them. Its network and its optimizer are in the
checkpoint, so a killed game goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from expunge.engine.gradients import Gradients, let_go, seed_draws
from expunge.engine.optimizer import MaskedOptimizer
from expunge.engine.rhythm import Update
from expunge.errors import BadSetting
from expunge.parts.plan import Plan, Term
from expunge.parts.players import Player, players_of
from expunge.seeds import derive, generator

if TYPE_CHECKING:
    from expunge.engine.loop import Phase
    from expunge.engine.workbench import Workbench


def build_networks(plan: Plan, workbench: Workbench) -> list[str]:
    """Make the players' own networks where they are not there yet; returns their names."""
    own = [p for p in players_of(plan) if p.part is None]
    for player in own:
        if player.name not in workbench.networks:
            seed = derive(workbench.seed, "player", player.name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = player.network(workbench.case, seed)  # type: ignore[operator]
            workbench.networks[player.name] = network.to(workbench.device)
    return [p.name for p in own]


class Seat:
    """A player in a phase. first: the place of its first term among all of the phase's."""

    def __init__(self, player: Player, phase: Phase, first: int):
        self.player, self.first = player, first
        self.splits = list(dict.fromkeys(term.on for term in player.terms))
        self.gradients = Gradients(
            Plan(*player.terms),
            (),
            phase.distribution,
            phase.bench.device,
            lambda i, step: phase._value(first + i, step),
        )

    def sit(self, phase: Phase) -> None:
        """Take the weights that are its own; nobody else moves them in this phase."""
        player, free = self.player, {id(p) for p, flag in phase.flags if flag}
        if player.part is None:
            self.network = phase.bench.networks[player.name]
            self.flags = [(p, p.requires_grad) for p in self.network.parameters()]
            named = dict(self.network.named_parameters())
            if not any(flag for _, flag in self.flags):  # frozen as a reference by the phase that trained it first
                self.network.requires_grad_(True)
            free = {id(p) for p in self.network.parameters() if p.requires_grad}
        else:
            self.network = phase.trained
            named = {n: p for n, p in self.network.named_parameters() if player.owns(n)}
            self.flags = []
            if not named:
                inside = ", ".join(n for n, _ in self.network.named_children())
                raise BadSetting(
                    f"expected a submodule '{player.part}' with weights for the player {player.name}, found {inside}; name one "
                    "of these, or pass a function that builds a network"
                )
        self.mask = {n: id(p) in free for n, p in named.items()}
        self.own = [p for n, p in named.items() if self.mask[n]]
        for p in self.own:
            p.requires_grad_(False)

    def ready(self, phase: Phase, updates_per_epoch: int) -> None:
        """Make its optimizer; its learning rate's schedule runs over its own updates."""
        player = self.player
        if player.part is None:
            self.modes = [(m, m.training) for m in self.network.modules()]
            self.network.train(player.mode == "train")
        turns = phase.plan.epochs * updates_per_epoch * player.steps // player.every + player.warm_up
        every = max(player.steps * updates_per_epoch // player.every, 1)
        self.optimizer = MaskedOptimizer(self.network, player.optimizer, self.mask, turns, every)
        common = [i for i, t in enumerate(player.terms) if t.every == 1]
        self.turns = [(common, 1)] if common else []
        self.turns += [([i], t.every) for i, t in enumerate(player.terms) if t.every > 1]

    def leave(self) -> None:
        for p, flag in self.flags:
            p.requires_grad_(flag)
        if self.player.part is None:
            self.network.zero_grad(set_to_none=True)
            for module, training in getattr(self, "modes", []):
                module.training = training

    # -- playing ---------------------------------------------------------------------------------------------------
    def warm_up(self, phase: Phase, updates: list[Update]) -> None:
        """Its updates before the model's first. A run killed here begins here again."""
        for k in range(self.player.warm_up):
            self._update(phase, updates[k % len(updates)], k, len(updates), ("warm-up", k))

    def play(self, phase: Phase, updates: list[Update]) -> dict[str, float]:
        """Its turns in one update of the model; returns the terms' mean losses of the last by their labels."""
        player, position = self.player, phase.position
        count = position.epoch * len(updates) + position.update
        if count % player.every:
            return {}
        entry: dict[str, float] = {}
        turn = count // player.every * player.steps
        for k in range(player.steps):
            rows = updates[(position.update // player.every * player.steps + k) % len(updates)]
            entry |= self._update(phase, rows, turn + k, len(updates), (position.epoch, position.update, k))
        return entry

    def _update(
        self, phase: Phase, update: Update, count: int, updates_per_epoch: int, place: tuple[object, ...]
    ) -> dict[str, float]:
        epoch, player, entry = phase.position.epoch, self.player, {}
        draws = derive(phase.seed, "player", player.name, *place)
        local = {n: phase.distribution.mine(ids) for n, ids in update.items()}
        share = {n: len(ids) for n, ids in update.items()}
        weights = phase.distribution.local_weights(share)
        for terms, every in self.turns:
            chosen = [i for i in terms if self._plays(player.terms[i], i, update, phase, epoch)]
            if not chosen or count % every:
                continue
            seed_draws(draws, phase.bench.device)
            with self._turn(phase):
                steps = phase._steps(
                    {n: rows for n, rows in local.items() if n in self.splits}, weights, updates_per_epoch,
                    self.network, self._layers(), ("player", player.name, *place),
                )  # fmt: skip
                factor = {i: phase._weight(self.first + i, epoch) * weights[player.terms[i].on] for i in chosen}
                self.optimizer.zero_grad()
                losses = self.gradients.put(
                    chosen, steps, self.optimizer.parameters, weights, factor, draws,
                    partial(generator, phase.seed, "player", *place),
                )  # fmt: skip
                self.optimizer.epoch = epoch
                self.optimizer.step()
                self.optimizer.zero_grad()
                let_go(steps)
            for i, value in self.gradients.read(losses, weights).items():
                entry[phase.labels[self.first + i]] = value
                phase._answer(self.first + i, value, epoch)
        return entry

    def _plays(self, term: Term, i: int, update: Update, phase: Phase, epoch: int) -> bool:
        return term.on in update and phase._counts(self.first + i, epoch)

    def _layers(self) -> dict[str, tuple[str, ...]]:
        return {
            n: tuple(sorted({x for t in self.player.terms if t.on == n for x in t.objective.layers}))
            for n in self.splits
        }

    @contextmanager
    def _turn(self, phase: Phase) -> Iterator[None]:
        """Its weights move, and the model's hold still."""
        held = [p for optimizer in phase.optimizers for p in optimizer.parameters if p.requires_grad]
        for p in held:
            p.requires_grad_(False)
        for p in self.own:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p in self.own:
                p.requires_grad_(False)
            for p in held:
                p.requires_grad_(True)


def seats_of(phase: Phase, first: int) -> list[Seat]:
    """The phase's players in order; `first` is the place of the first player's first term."""
    seats = []
    for player in players_of(phase.plan):
        seats.append(Seat(player, phase, first))
        first += len(player.terms)
    return seats


__all__ = ["Seat", "build_networks", "seats_of"]
