"""The one loop. Every tuned method, every training recipe, every relearning attack is a plan that runs here.

    for phase in plan.phases or [plan]:
        scope -> mask; objectives prepare; references fill their caches
        for epoch:
            for update in rhythm(epoch):           # which rows of which splits
                players play                       # second networks with terms and optimizers of their own
                steps  = one Step per split        # one forward each, shared by the terms of that split
                steps  = adversary.attack(...)     # worst-case inputs or activations
                g      = gradients of the terms    # through a weight-space adversary where one is set
                balance -> one gradient -> masked optimizer step -> multipliers, averages, stop.after_step
            stop.after_epoch                       # holdout reached, utility floor, ...

Every random draw is a function of (seed, phase, epoch, update), so the loop can be left at any update and entered again: the
weights are the same as if nothing had happened. `Checkpoint` is what that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.engine.distribution import Distribution
from expunge.engine.gradients import Gradients, let_go, run_anew, seed_draws
from expunge.engine.measured import Curves, Measured, of_original
from expunge.engine.optimizer import MaskedOptimizer
from expunge.engine.players import Seat, build_networks, seats_of
from expunge.engine.rhythm import Update, updates_of
from expunge.engine.workbench import Workbench
from expunge.errors import BadSetting, CollapsedUtility, ConstantTerm, Diverged, EmptyScope, UnmetNeed
from expunge.parts.adversaries import Adversary
from expunge.parts.plan import Auxiliary, Plan, Term
from expunge.parts.players import Player
from expunge.parts.references import collect_needs
from expunge.parts.schedules import Feedback
from expunge.parts.scopes.base import Everything, Scope
from expunge.parts.step import Joint, Step
from expunge.parts.stops import Divergence, Halt, Progress, Stop
from expunge.seeds import derive, generator

if TYPE_CHECKING:
    from expunge.engine.checkpoint import Checkpointer


@dataclass
class Trace:
    """What happened: one entry per update in `history`, why it ended, and what the phases produced."""

    history: list[dict[str, Any]] = field(default_factory=list)
    ended: str = "all epochs done"
    updates: int = 0
    restored: bool = False


@dataclass
class Position:
    """Where the loop is: all that a resumed run needs beside tensors."""

    phase: int = 0
    epoch: int = 0
    update: int = 0
    step: int = 0
    multipliers: dict[str, Any] = field(default_factory=dict)
    averaged: int = 0
    best_utility: float | None = None
    first_losses: dict[str, float] = field(default_factory=dict)
    moved_terms: list[str] = field(default_factory=list)
    kept_values: list[float] = field(default_factory=list)


def run_plan(
    plan: Plan,
    workbench: Workbench,
    *,
    stop: Stop | None = None,
    checkpointer: Checkpointer | None = None,
    distribution: Distribution | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    curves: Curves | None = None,
) -> Trace:
    """Run a plan in place on `workbench.model`. stop: asked beside the plan's own. curves: what to measure on the way. Returns
    the trace."""
    phases = plan.phases or (plan,)
    last = max((i for i, p in enumerate(phases) if p.trains == "model"), default=-1)
    trace = Trace()
    position, resumed = Position(), None
    if checkpointer is not None:
        resumed = checkpointer.load()
        if resumed is not None:
            position, trace.history = resumed.position, resumed.history
            trace.updates = position.step
    for number, phase in enumerate(phases):
        if number < position.phase:  # finished before the kill: only its networks are needed again
            _auxiliary(phase, workbench)
            if resumed is not None:
                for name in build_networks(phase, workbench):
                    resumed.restore_network(name, workbench)
            if resumed is not None and not isinstance(phase.trains, str):
                resumed.restore_network(phase.trains.name, workbench)
                _freeze(phase, workbench)
            continue
        if number > position.phase:
            position = Position(phase=number, step=position.step)
        if resumed is not None and number == resumed.position.phase:
            resumed.restore_entry(phase, workbench)
        # A phase may harm on purpose what the next one repairs (UNSIR), so only the last one answers for the outcome.
        asked = stop if number == last else None
        runner = Phase(
            phase,
            number,
            workbench,
            position,
            trace,
            asked,
            checkpointer,
            distribution or Distribution(),
            log,
            curves,
        )
        halted = runner.run(resumed if resumed is not None and resumed.position.phase == number else None)
        resumed = None
        _freeze(phase, workbench)
        if halted is not None:
            trace.ended = halted.reason
            trace.restored = trace.restored or halted.rollback
            if halted.rollback:
                break
    trace.updates = position.step
    return trace


class Phase:
    """One phase of a plan: fixed terms, scope, optimizer and rhythm on one network."""

    def __init__(
        self,
        plan: Plan,
        number: int,
        workbench: Workbench,
        position: Position,
        trace: Trace,
        stop: Stop | None,
        checkpointer: Checkpointer | None,
        distribution: Distribution,
        log: Callable[[dict[str, Any]], None] | None,
        curves: Curves | None = None,
    ):
        self.plan, self.number, self.bench, self.position, self.trace = plan, number, workbench, position, trace
        self.checkpointer, self.distribution, self.log = checkpointer, distribution, log
        workbench.phase = number
        self.seed = derive(workbench.seed, "phase", number)
        self.network = _auxiliary(plan, workbench)
        self.trained_name = plan.trains if isinstance(plan.trains, str) else plan.trains.name
        self.curves = curves if self.trained_name == "model" else None
        stops: Stop = Divergence()
        if stop is not None and plan.scope is not None and not plan.scope.comparable:
            workbench.note("floor", f"off: with {plan.scope} the model's utility is not what it was the original's")
            stop = None
        for extra in (plan.stop, stop if self.trained_name == "model" else None):
            stops = stops if extra is None else stops | extra
        self.stop = stops
        self.adversaries: tuple[Adversary, ...] = (
            plan.adversary if isinstance(plan.adversary, tuple) else (plan.adversary,) if plan.adversary else ()
        )
        self.terms = (*plan.terms, *(goal for a in self.adversaries for goal in a.goal))
        self.seats: list[Seat] = seats_of(self, len(self.terms))
        self.terms = (*self.terms, *(term for seat in self.seats for term in seat.player.terms))
        self.adversaries = tuple(a for a in self.adversaries if not isinstance(a, Player))
        self.repeats = max((a.repeats for a in self.adversaries), default=1)
        build_networks(plan, workbench)
        for adversary in self.adversaries:
            if plan.terms and adversary.on not in plan.splits:
                raise BadSetting(
                    f"expected {adversary} to attack a split that the plan has terms on ({', '.join(plan.splits)}), found "
                    f"'{adversary.on}'; pass on=..."
                )
        self.gradients = Gradients(plan, self.adversaries, self.distribution, workbench.device, self._value)
        self.splits = self._splits()
        self.labels = _labels((*plan.terms, *(goal for a in self.adversaries for goal in a.goal)))
        self.labels += [f"{s.player.name}: {label}" for s in self.seats for label in _labels(s.player.terms)]
        self.active_of: tuple[int, list[int]] = (-1, [])
        readers = {
            name: [t.objective for t in self.terms if name in (t.on, *t.objective.beside)] for name in plan.splits
        }
        self.layers = {name: tuple(sorted({x for r in read_by for x in r.layers})) for name, read_by in readers.items()}
        self.optimizers: list[MaskedOptimizer] = []
        self._measure, self._measure_original = Measured(workbench, lambda: self.trained), of_original(workbench)
        self.resumed_mean: list[Tensor] = []
        self.resumed_best: dict[str, Tensor] | None = None
        self.kept: list[dict[str, Tensor]] = []
        self.entry: dict[str, Tensor] | None = None

    # -- before the first step -------------------------------------------------------------------------------------
    def _splits(self):
        chosen = {}
        pool = dict(self.plan.pool)
        for name in dict.fromkeys([*self.plan.splits, *(n for seat in self.seats for n in seat.splits)]):
            if name not in self.bench.splits:
                self.bench.case.split(name)  # raises the error that says how to get it
            split = self.bench.splits[name]
            if name in pool:
                amount = pool[name]
                size = round(amount * len(split)) if amount <= 1 and isinstance(amount, float) else int(amount)
                split = split.sample(max(size, 1), generator(self.seed, "pool", name))
            chosen[name] = split
        return chosen

    def _prepare(self) -> None:
        plan, bench = self.plan, self.bench
        if self.number > 0 and isinstance(plan.trains, str):
            # what masks, frozen weights and prepared memory of a later phase are made from: a resumed run needs it again
            self.entry = {k: v.detach().to("cpu", copy=True) for k, v in self.network.state_dict().items()}
        scope = plan.scope or Everything()
        self.scope = scope
        self.flags = [(p, p.requires_grad) for p in self.network.parameters()]
        frozen = [n for n, p in self.network.named_parameters() if not p.requires_grad and not scope.thaws(n)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "scope"))
            self.trained = scope.enter(self.network, bench)
        for seat in self.seats:
            seat.sit(self)
        networks = {**bench.networks, self.trained_name: self.trained}
        self.networks = networks
        saved = bench.model
        bench.model = self.trained if self.trained_name == "model" else bench.model
        try:
            mask = scope.select(bench) if self.trained_name == "model" else None
            self.memory = {i: t.objective.prepare(bench, t.on) for i, t in enumerate(self.terms)}
        finally:
            bench.model = saved
        if mask is None:
            mask = {n: p.requires_grad for n, p in self.trained.named_parameters()}
        # a scope never thaws what the caller froze, and a player's part is its own
        mask = {n: m for n, m in mask.items() if n not in frozen and not any(s.player.owns(n) for s in self.seats)}
        live = sum(int(m.sum()) if isinstance(m, Tensor) else m * p.numel() for m, p in _pairs(mask, self.trained))
        total = sum(p.numel() for p in self.trained.parameters())
        bench.note("live_weights_fraction", live / max(total, 1))
        if live == 0 and plan.terms:
            bench.warn(f"the scope {scope} selected none of {total} weights; nothing can change", EmptyScope)
        for name, p in self.trained.named_parameters():
            m = mask.get(name, False)
            p.requires_grad_(bool(m.any()) if isinstance(m, Tensor) else bool(m))
        needs = collect_needs(self.terms)
        bench.references.fresh_inputs = any(s.augment is not None for s in self.splits.values())
        with self.distribution.autocast():
            # before the first step the working copy still is the original: nothing else need be read
            same = self.number == 0 and type(scope).enter is Scope.enter and self.trained_name == "model"
            bench.references.prepare(needs, self.splits, original=self.network if same else None)
        # A rollback needs a state to go back to; the case's own model is that, unless adapters have changed the keys.
        self.start = None if _shapes(self.trained) == _shapes(bench.case.model) else self._snapshot()
        self.trained = self.distribution.shard(self.trained)
        updates = self._updates(0)
        per_epoch = len(updates)
        self.total_updates = per_epoch * plan.epochs
        moves = self._moves()
        self.optimizers = [
            MaskedOptimizer(self.trained, spec, mask, per_epoch * plan.epochs * self.repeats, per_epoch * self.repeats)
            for spec, _ in moves
        ]
        self.moves = [(number, terms, 1) for number, (_, terms) in enumerate(moves)]
        self.moves = [turn for move in self.moves for turn in self._turns(*move)]
        for seat in self.seats:
            seat.ready(self, per_epoch)
        self.anchors = [[p.detach().clone() for p in o.parameters] for o in self.optimizers] if plan.proximal else []
        if plan.balance is not None and self.optimizers:
            saved, bench.model = bench.model, self.trained if self.trained_name == "model" else bench.model
            self.gradients.memory = plan.balance.prepare(bench, list(self.optimizers[0].parameters))
            bench.model = saved

    def _moves(self) -> list[tuple[Any, list[int]]]:
        """Terms grouped by the optimizer that moves for them: those of the plan first, then each with its own."""
        shared = [i for i, t in enumerate(self.plan.terms) if t.optimizer is None]
        groups: list[tuple[Any, list[int]]] = [(self.plan.optimizer, shared)] if shared or not self.plan.terms else []
        for i, term in enumerate(self.plan.terms):
            if term.optimizer is not None:
                groups.append((term.optimizer, [i]))
        return groups

    def _turns(self, number: int, terms: list[int], every: int) -> list[tuple[int, list[int], int]]:
        """(optimizer, terms, every): the terms that share an update first, then each lazy one's own."""
        common = [i for i in terms if self.plan.terms[i].every == 1]
        lazy = [(number, [i], self.plan.terms[i].every) for i in terms if self.plan.terms[i].every > 1]
        return ([(number, common, every)] if common or not terms else []) + lazy

    @property
    def all_optimizers(self) -> list[MaskedOptimizer]:
        """The model's, then the players': what a checkpoint keeps the state of."""
        return [*self.optimizers, *(seat.optimizer for seat in self.seats)]

    # -- weights and rows -------------------------------------------------------------------------------------------
    def _active(self, epoch: int) -> list[int]:
        """Terms with a weight this epoch; which these are does not change within it, so it is worked out once."""
        if self.active_of[0] != epoch:
            self.active_of = epoch, [i for i in range(len(self.plan.terms)) if self._counts(i, epoch)]
        return self.active_of[1]

    def _counts(self, i: int, epoch: int) -> bool:
        """Whether a term has a weight this epoch."""
        return self._weight(i, epoch) != 0 or isinstance(self.terms[i].schedule, Feedback)

    def _weight(self, i: int, epoch: int) -> float:
        schedule = self.terms[i].schedule
        if isinstance(schedule, Feedback):
            return schedule.value(self.position.multipliers.get(str(i), schedule.start))
        return schedule.at(epoch, self.plan.epochs)

    def _updates(self, epoch: int) -> list[Update]:
        """The rows of every update of an epoch."""
        active = list(dict.fromkeys(self.plan.terms[i].on for i in self._active(epoch)))
        active = list(dict.fromkeys([*active, *(name for seat in self.seats for name in seat.splits)]))
        pairs = self.plan.mode == "train" and _has_batch_norm(self.network)
        return updates_of(self.plan, self.splits, active, self.seed, epoch, pairs)

    # -- running ---------------------------------------------------------------------------------------------------
    def run(self, resumed: Any) -> Halt | None:
        self._prepare()
        try:
            if resumed is not None:
                resumed.restore(self)
            self.network_modes = [(m, m.training) for m in self.trained.modules()]
            self.trained.train(self.plan.mode == "train")
            halt = self._epochs()
        finally:
            for module, training in getattr(self, "network_modes", []):
                module.training = training
            self.trained.zero_grad(set_to_none=True)
        if self.plan.average is not None and self.position.averaged and not (halt and halt.rollback):
            with torch.no_grad():
                for p, mean in zip(self.optimizers[0].parameters, self.mean, strict=True):
                    p.copy_(mean)
        self.bench.references.give_back()
        for seat in self.seats:
            seat.leave()
        back = self.scope.leave(self.distribution.gather(self.trained))
        for p, flag in self.flags:
            self.distribution.now(p).requires_grad_(flag)
        if self.trained_name == "model":
            self.bench.model = back
        self.bench.networks[self.trained_name] = back
        self._check_constant()
        return halt

    def _epochs(self) -> Halt | None:
        position, plan = self.position, self.plan
        self.mean = (
            [p.detach().clone() for p in self.optimizers[0].parameters] if plan.average and self.optimizers else []
        )
        for mean, saved in zip(self.mean, self.resumed_mean, strict=False):
            mean.copy_(saved)
        self.best: dict[str, Tensor] | None = self.resumed_best
        total = plan.epochs
        if self.curves is not None and position.step == 0:
            self._enter({"step": 0, "phase": self.number, "epoch": 0, "losses": {}})
        if self.seats and position.epoch == position.update == 0 and self._updates(0):
            for seat in self.seats:
                seat.warm_up(self, self._updates(0))
        while position.epoch < total:
            updates = self._updates(position.epoch)
            while position.update < len(updates):
                halt = self._one(updates[position.update], len(updates), updates)
                position.update += 1
                position.step += 1
                if halt is None:
                    halt = self._ask(self.stop.after_step)
                if halt is not None:
                    return self._halted(halt)
                if self.checkpointer is not None:
                    self.checkpointer.maybe_save(self)
                self.bench.progress(plan.name or self.trained_name, position.epoch * len(updates) + position.update,
                                    total * len(updates))  # fmt: skip
            position.epoch += 1
            position.update = 0
            self._measure.clear()
            halt = self._ask(self.stop.after_epoch)
            if halt is not None:
                return self._halted(halt)
            if self.stop.keeps_best and self.trained_name == "model":
                self.best = self._snapshot(self.best)
            if plan.rewind is not None:
                self.kept.append(self._snapshot())
                position.kept_values.append(plan.rewind.value(self._measure))
        self._rewind()
        return None

    def _rewind(self) -> None:
        """After the last epoch: the kept epoch that the plan's rule chooses comes back."""
        rule = self.plan.rewind
        if rule is None or not self.kept:
            return
        reference = rule.reference(self._measure)
        chosen = rule.choose(self.position.kept_values, reference)
        self.distribution.load(self.trained, self.kept[chosen])
        self.bench.note("rewound_to_epoch", chosen + 1)
        self.bench.note("rewind_reference", reference)

    def _ask(self, question: Callable[[Progress], Halt | None]) -> Halt | None:
        losses = self.trace.history[-1]["losses"] if self.trace.history else {}
        return question(
            Progress(self.position.step, self.position.epoch, losses, self._measure, self._measure_original)
        )

    def _halted(self, halt: Halt) -> Halt:
        if halt.rollback and self.trained_name == "model":
            self.distribution.load(self.trained, self.best or self.start or self.bench.original.state_dict())
            self.bench.warn(halt.warning, Diverged if "loss of" in halt.reason else CollapsedUtility)
        return halt

    def _snapshot(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """A copy of the state on the CPU; into: an earlier snapshot whose memory is used again."""
        still = {n for n, p in self.trained.named_parameters() if not p.requires_grad}
        state = {k: v.detach() for k, v in self.trained.state_dict().items() if k not in still}
        if into is None:
            return {k: v.to("cpu", copy=True) for k, v in state.items()}
        for name, value in state.items():
            into[name].copy_(value)
        return into

    # -- one update ------------------------------------------------------------------------------------------------
    def _one(self, update: Update, updates_per_epoch: int, updates: list[Update]) -> Halt | None:
        epoch, entry = self.position.epoch, {}
        self._measure.clear()
        place = epoch, self.position.update
        count = epoch * updates_per_epoch + self.position.update
        played = [seat.play(self, updates) for seat in self.seats if not seat.player.after]
        draws = derive(self.seed, "step", *place)
        seed_draws(draws, self.bench.device)
        share = {n: len(ids) for n, ids in update.items()}
        weights = self.distribution.local_weights(share)
        local = {n: self.distribution.mine(ids) for n, ids in update.items()}
        own = {n: ids for n, ids in local.items() if n in self.layers}
        active = self._active(epoch)
        for number, terms, every in self.moves:
            optimizer = self.optimizers[number]
            chosen = [i for i in terms if self.plan.terms[i].on in update and i in active]
            if not chosen or count % every:
                continue
            steps = self._steps(own, weights, updates_per_epoch)
            factor = self._factors(chosen, weights, share)
            optimizer.zero_grad()
            self._attack(chosen, steps, factor)
            for repeat in range(self.repeats):  # one attack, several updates
                if repeat:
                    optimizer.zero_grad()
                    used, steps = steps, run_anew(steps)
                    let_go(used)
                losses = self.gradients.put(
                    chosen,
                    steps,
                    optimizer.parameters,
                    weights,
                    factor,
                    draws,
                    partial(generator, self.seed, "adversary", *place),
                    count,
                )
                optimizer.epoch = epoch
                optimizer.step()
            let_go(steps)
            if self.plan.proximal is not None:
                progress = (epoch + (self.position.update + 1) / updates_per_epoch) / self.plan.epochs
                self.plan.proximal.apply(optimizer.parameters, self.anchors[number], progress)
            for i, value in self.gradients.read(losses, weights).items():
                entry[self.labels[i]] = value
                self._answer(i, value, epoch)
        played += [seat.play(self, updates) for seat in self.seats if seat.player.after]
        for theirs in played:
            entry |= theirs
        if self.plan.average is not None and self.plan.average.takes(self.position.step + 1, self.total_updates):
            self.position.averaged += 1
            with torch.no_grad():
                for mean, p in zip(self.mean, self.optimizers[0].parameters, strict=True):
                    mean.lerp_(p, self.plan.average.share(self.position.averaged))
        record = {
            "step": self.position.step + 1, "phase": self.number, "epoch": epoch + 1, "losses": entry,
        }  # fmt: skip
        if self.position.multipliers:
            record["multipliers"] = {i: self._weight(int(i), epoch) for i in self.position.multipliers}
        self._enter(record)
        return None

    def _answer(self, i: int, value: float, epoch: int) -> None:
        """What a term's mean loss is told to: the check that it moves at all, and its own weight."""
        if self.terms[i].every == 1:
            self._note_term(i, value)
        schedule = self.terms[i].schedule
        if isinstance(schedule, Feedback):
            now = self.position.multipliers.get(str(i), schedule.start)
            self.position.multipliers[str(i)] = schedule.next(now, value, epoch)

    def _enter(self, record: dict[str, Any]) -> None:
        """Into the history and the log, with what the curves ask for at this step."""
        if self.curves is not None and record["step"] % self.curves.every == 0:
            record["measured"] = self.curves.measure(self._measure)
        self.trace.history.append(record)
        if self.log is not None:
            self.log(record)

    def _steps(
        self, rows: Update, weights: dict[str, float], updates_per_epoch: int, network: nn.Module | None = None,
        layers: dict[str, tuple[str, ...]] | None = None, draws: tuple[object, ...] = (),
    ) -> dict[str, Step]:  # fmt: skip
        """One step per split. network, layers, draws: of a player's turn; default: the model's own update."""
        steps: dict[str, Step] = {}
        network, layers = self.trained if network is None else network, self.layers if layers is None else layers
        total = max(self.plan.epochs * updates_per_epoch, 1)
        done = self.position.epoch * updates_per_epoch + self.position.update
        for name, ids in rows.items():
            split = self.splits[name]
            # each process draws for its own rows; one process draws as if there were no others
            own = (self.distribution.rank,) if self.distribution.count > 1 else ()
            rng: Any = partial(
                generator, self.seed, "draw", self.position.epoch, self.position.update, name, *own, *draws
            )
            batch = self.bench.fill(split.data.fetch(ids))
            if split.augment is not None or self.bench.task.draws:
                rng = rng()
                batch = batch if split.augment is None else split.augment(batch, rng)
                batch = self.bench.task.prepare(batch, rng)
            steps[name] = Step(
                network, self.bench.task, batch, self.bench.references, rng, name, self.position.epoch,
                done / total, layers.get(name, ()), self.networks, mean=partial(self.distribution.mean_of, weight=weights[name]),
            )  # fmt: skip
        joint = Joint(list(steps.values())) if self.plan.rhythm == "mixed" and len(steps) > 1 else None
        for step in steps.values():
            step.peers, step.joint = steps, joint
        return steps

    def _value(self, i: int, step: Step) -> Tensor:
        """(B,) an objective's value; its prepared memory is handed over with the step."""
        step.scratch["memory"] = self.memory.get(i)
        return self.terms[i].objective(step)

    def _factors(self, chosen: list[int], weights: dict[str, float], share: dict[str, int]) -> dict[int, float]:
        """What each term's mean is multiplied with in this update."""
        factor, rows = {}, sum(share.values())
        for i in chosen:
            on = self.plan.terms[i].on
            part = share[on] / rows if self.plan.rhythm == "mixed" else 1.0
            factor[i] = self._weight(i, self.position.epoch) * part * weights[on]
        return factor

    def _attack(self, chosen: list[int], steps: dict[str, Step], factor: dict[int, float]) -> None:
        """Replace the steps of attacked splits by their worst case. A goal's weights are relative to their sum."""
        first = len(self.plan.terms)
        for adversary in self.adversaries:
            own = range(first, first + len(adversary.goal))
            first += len(adversary.goal)
            attacked = {i: factor[i] for i in chosen if self.plan.terms[i].on == adversary.on}
            if adversary.space == "weights" or not attacked:
                continue
            if adversary.goal:
                total = sum(abs(self._weight(i, self.position.epoch)) for i in own)
                attacked = {i: -self._weight(i, self.position.epoch) / total for i in own}

            def harm(s: Step, which: dict[int, float] = attacked) -> Tensor:
                return torch.stack([w * self._value(i, s).mean() for i, w in which.items()]).sum()

            steps[adversary.on] = adversary.attack(steps[adversary.on], harm)

    # -- silence is never success ----------------------------------------------------------------------------------
    def _note_term(self, i: int, value: float) -> None:
        label = self.labels[i]
        first = self.position.first_losses.setdefault(label, value)
        if value != first and label not in self.position.moved_terms:
            self.position.moved_terms.append(label)

    def _check_constant(self) -> None:
        for label in self.position.first_losses:
            count = sum(1 for h in self.trace.history if h["phase"] == self.number and label in h["losses"])
            if count > 3 and label not in self.position.moved_terms:
                self.bench.warn(f"the term {label} had the same value at all {count} updates", ConstantTerm)


def _labels(terms: tuple[Term, ...]) -> list[str]:
    """A short unique label per term, for logs and curves."""
    labels: list[str] = []
    for term in terms:
        label = f"{term.objective}[{term.on}]"
        labels.append(label if label not in labels else f"{label}#{len(labels)}")
    return labels


def _auxiliary(plan: Plan, workbench: Workbench) -> nn.Module:
    """The network that a phase trains; an auxiliary one is built on first use."""
    if isinstance(plan.trains, str):
        if plan.trains not in workbench.networks:
            raise UnmetNeed(
                f"expected a network '{plan.trains}' to train, found {', '.join(workbench.networks)}; "
                "use Auxiliary(name, build) in the phase that trains it first"
            )
        return workbench.networks[plan.trains]
    assert isinstance(plan.trains, Auxiliary)
    name = plan.trains.name
    if name not in workbench.networks:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(workbench.seed, "auxiliary", name))
            network = plan.trains.build(workbench.case, derive(workbench.seed, "auxiliary", name))
        workbench.networks[name] = network.to(workbench.device)
    return workbench.networks[name]


def _freeze(plan: Plan, workbench: Workbench) -> None:
    """A trained auxiliary network becomes a frozen reference."""
    if isinstance(plan.trains, Auxiliary):
        workbench.references.add(plan.trains.name, workbench.networks[plan.trains.name])


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _pairs(mask: dict[str, Any], model: nn.Module) -> Iterator[tuple[Any, Tensor]]:
    for name, p in model.named_parameters():
        yield mask.get(name, False), p
