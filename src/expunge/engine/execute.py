"""Carry out an action (plan, edit, guard, exact method) on a copy of the case's model, and record what happened."""

from __future__ import annotations

import copy
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.cases.case import Case
from expunge.cases.data import Split
from expunge.engine.checkpoint import Checkpointer
from expunge.engine.distribution import Distribution, launched
from expunge.engine.loop import Trace, run_plan
from expunge.engine.measured import Curves, after_edit
from expunge.engine.memory import out_of_memory
from expunge.engine.original import Original
from expunge.engine.rundir import RunDirectory
from expunge.engine.workbench import Workbench
from expunge.errors import BadSetting, ChangedNothing, CollapsedUtility, UnmetNeed
from expunge.files import digest_weights
from expunge.parts.plan import Action, Edit, Exact, Guard, Plan, Protection, Training
from expunge.parts.scalars import Scalars
from expunge.parts.stops import Stop, UtilityFloor


@dataclass
class Result:
    """model: the changed copy. trace: the loop's (empty for edits). proof: an exact method's numbers, else None.
    original: the model that the request came with; the case's own, unless the run changed that in place."""

    model: nn.Module
    trace: Trace
    seconds: float
    peak_memory_mb: float
    changed_fraction: float
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    proof: dict[str, Any] | None = None
    original: nn.Module | None = None


def execute(
    action: Action,
    case: Case,
    *,
    seed: int = 0,
    device: str | None = None,
    mixed_precision: str | None = None,
    floor: float | None = None,
    run: RunDirectory | None = None,
    identity: str = "",
    checkpoint_seconds: float = 30.0,
    checkpoint_steps: int | None = None,
    trackers: list[str] | None = None,
    state: dict[str, Any] | None = None,
    report: Callable[[str, int, int], None] | None = None,
    in_place: bool = False,
    stop: Stop | None = None,
    curves: Curves | None = None,
) -> Result:
    """Run `action` on a copy of `case.model` (the original is never changed, unless in_place) and return the copy.

    in_place: change `case.model` itself, so that memory holds one model; the original waits on disk (`Result.original`).
    floor: share of the original's utility on retain below which the best earlier state is restored; None turns it off.
    run: an open run directory for metrics and checkpoints. state: what the method kept from an earlier request.
    stop: ends a plan, beside its own. curves: what to measure while a plan runs.
    """
    distribution = (
        Distribution.make(device, mixed_precision, trackers, str(run.path) if run else None)
        if device not in (None, "cpu") or mixed_precision or trackers or launched() > 1
        else Distribution()
    )
    if trackers and distribution.accelerator is not None:
        distribution.accelerator.init_trackers("expunge")
    home = next(case.model.parameters(), torch.empty(0)).device
    place = distribution.device if distribution.accelerator is not None else home
    original = Original(case.model, run.path if run else None).module if in_place else case.model
    model = case.model if in_place else copy.deepcopy(case.model)
    bench = Workbench(
        case, model.to(place), seed, place, state=dict(state or {}), report=report, original=original,
        scalars=Scalars(run.path / "references") if run is not None else None,
    )  # fmt: skip
    if distribution.count > 1:
        bench.note(
            "processes",
            f"{distribution.count}, {'weights cut over them' if distribution.sharded else 'each with a copy'}",
        )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if floor is not None and getattr(case.task, "labels", "labels") not in case.data.names:
        bench.note("floor", "off: utility cannot be measured without labels")
        floor = None
    trace, proof = Trace(), None
    threads_state = torch.random.get_rng_state()
    start = time.perf_counter()
    try:
        if len(case.split("forget")) == 0:
            trace.ended = "nothing to forget"
        elif isinstance(action, Plan):
            trace = _run_plan(
                action,
                bench,
                _stops(floor, stop),
                run,
                identity,
                checkpoint_seconds,
                checkpoint_steps,
                distribution,
                curves,
            )
        elif isinstance(action, Edit):
            with torch.random.fork_rng(devices=[]):
                action.apply(bench)
            _check_floor(bench, floor, trace)
        elif isinstance(action, Guard):
            if action.train is not None:  # its networks; the floor asks for the model, which stays as it is
                plan = action.train(bench)
                trace = _run_plan(
                    plan, bench, None, run, identity, checkpoint_seconds, checkpoint_steps, distribution, None
                )
            bench.model = action.wrap(bench)
        elif isinstance(action, Exact):
            bench.model = action.forget(bench)
        elif isinstance(action, Protection):
            raise UnmetNeed(
                "expected a method that answers a request, found one that acts before training; "
                "use expunge.protect(case, method) to train a model with it"
            )
        else:
            raise BadSetting(
                f"expected a Plan, Edit, Guard, Exact or Protection, found {type(action).__name__}; return one"
            )
    except (MemoryError, RuntimeError) as error:
        told = out_of_memory(error, action)
        if told is None:
            raise
        raise told from error
    finally:
        torch.random.set_rng_state(threads_state)
        if trackers and distribution.accelerator is not None:
            distribution.accelerator.end_training()
    seconds = time.perf_counter() - start
    if isinstance(action, Exact) and action.proof is not None and trace.ended != "nothing to forget":
        proof = action.proof(
            bench, bench.model
        )  # after the clock: a proof may retrain, and is no part of the method's cost
    result = bench.model.to(home)
    # in place: reading the whole original back from disk would cost the memory that was saved
    changed = changed_fraction(original, result) if not in_place else float("nan")
    if changed == 0 and len(case.split("forget")) and not isinstance(action, Guard):
        bench.warn("the method left every weight as it was", ChangedNothing)
    return Result(
        result, trace, seconds, peak_memory_mb(), changed, bench.notes, bench.warnings, bench.state, proof, original
    )  # fmt: skip


def _run_plan(
    plan: Plan, bench: Workbench, stop: Stop | None, run: RunDirectory | None, identity: str, seconds: float,
    steps: int | None, distribution: Distribution, curves: Curves | None,
) -> Trace:  # fmt: skip
    checkpointer, log = None, None
    if run is not None:
        checkpointer = Checkpointer(run.path, identity, seconds, steps)
    if run is not None and checkpointer is not None and distribution.is_main:
        resumed = checkpointer.load()
        run.start_metrics(resumed.history if resumed is not None else [])
        log = run.log
    if distribution.accelerator is not None and distribution.accelerator.log_with:
        write, accelerator = log, distribution.accelerator

        def log(entry: dict[str, Any]) -> None:
            if write is not None:
                write(entry)
            accelerator.log(entry["losses"], step=entry["step"])

    return run_plan(
        plan, bench, stop=stop, checkpointer=checkpointer, distribution=distribution, log=log, curves=curves
    )


def _stops(floor: float | None, stop: Stop | None) -> Stop | None:
    """The utility floor, asked first, and the caller's own."""
    least = UtilityFloor(floor) if floor is not None else None
    return least | stop if least is not None and stop is not None else least or stop


def _check_floor(bench: Workbench, floor: float | None, trace: Trace) -> None:
    """One-shot edits have no earlier state but the original: below the floor, that is what comes back."""
    halt = UtilityFloor(floor).after_epoch(after_edit(bench)) if floor is not None else None
    if halt is not None:
        bench.model.load_state_dict(bench.original.state_dict())
        trace.restored, trace.ended = True, halt.reason
        bench.warn(halt.reason + "; the original was restored", CollapsedUtility)


def fit(
    case: Case, split: Split | str, seed: int, model: nn.Module | None = None, recipe: Training | None = None
) -> nn.Module:
    """Train a fresh model (or a given one, in place) by the recipe on a split: what `retrained` is made with.

    A case whose model was trained by `expunge.protect` retrains it in that way: the model has an
    `expunge_train(case, split, seed) -> nn.Module`, which is asked instead of the recipe."""
    rows = case.split(split) if isinstance(split, str) else split
    if model is None and recipe is None and callable(getattr(case.model, "expunge_train", None)):
        return case.model.expunge_train(case, rows, seed)  # type: ignore[operator]
    recipe = recipe or case.recipe
    if recipe is None:
        raise UnmetNeed(
            "expected the recipe that trained the model, found none; pass Case(recipe=Training(epochs=..., optimizer=...))"
        )
    trained = case.fresh(seed) if model is None else model
    place = next(trained.parameters(), torch.empty(0)).device
    saved = torch.random.get_rng_state()
    bench = Workbench(case, trained, seed, place, splits={rows.name: rows})
    run_plan(recipe.plan(on=rows.name), bench)
    torch.random.set_rng_state(saved)
    return bench.model


def weights_digest(model: nn.Module) -> str:
    """sha256 of the state dict, equal to that of the safetensors file made from it (see `files.digest_weights`)."""
    return digest_weights(model.state_dict())


def run_identity(case: Case, config: dict[str, Any]) -> str:
    """What makes two runs the same: case, weights before, method with settings, seed."""
    about = {"case": case.describe(), "weights": weights_digest(case.model), "config": config}
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_fraction(before: nn.Module, after: nn.Module) -> float:
    """Share of weights and buffers whose values differ; NaN where the state dicts do not have the same keys. A tensor of
    another shape (a ledger that has shrunk) counts as changed altogether."""
    a, b = before.state_dict(), after.state_dict()
    inside = getattr(after, "base", None)
    if a.keys() != b.keys() and isinstance(inside, nn.Module):  # a guard: what it is around
        b = inside.state_dict()
    if a.keys() != b.keys():
        return float("nan")
    total = moved = 0
    for key in a:
        same = a[key].shape == b[key].shape
        total += max(a[key].numel(), b[key].numel())
        moved += int((a[key] != b[key].to(a[key].device)).sum()) if same else max(a[key].numel(), b[key].numel())
    return moved / max(total, 1)


def peak_memory_mb() -> float:
    """Largest memory so far: of the GPU where there is one, else of this process (MiB).

    From the kernel's mark of this very process where there is one: `ru_maxrss` of a child starts at its parent's peak.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def forget_peak_memory() -> None:
    """Start the kernel's mark of this process anew, where there is one (Linux): else a later run in one process never shows less
    than an earlier one."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


__all__ = [
    "Result",
    "changed_fraction",
    "execute",
    "fit",
    "forget_peak_memory",
    "peak_memory_mb",
    "run_identity",
    "weights_digest",
]
