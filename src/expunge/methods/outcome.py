"""`unlearn(case, method)`: the main job. It checks every need first, works on a copy, and returns the model with a record."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from expunge.cases.case import Case
from expunge.engine.distribution import together
from expunge.engine.execute import Result, execute, run_identity, weights_digest
from expunge.engine.measured import Curves
from expunge.engine.rundir import RunDirectory, machine, versions
from expunge.errors import BadSetting, UnmetNeed
from expunge.methods.registry import Configured, Method, find, methods
from expunge.methods.state import FILE as STATE
from expunge.methods.state import digest_state, load_state, save_state
from expunge.methods.stored import is_protected, save_protected
from expunge.parts.guarded import is_saved, load_saved
from expunge.parts.plan import Action, Edit, Exact, Guard, Plan, Protection
from expunge.parts.stops import Stop


@dataclass
class Outcome:
    """model: the unlearned model, same class and keys as the original. record: what happened, as plain data (never samples).

    state: what the method keeps for the next request of a stream. proof: an exact method's own numbers, or None.
    action: the plan (or edit, ...) that was carried out.
    """

    model: nn.Module
    record: dict[str, Any]
    method: Configured | None
    case: Case
    state: dict[str, Any] = field(default_factory=dict)
    proof: dict[str, Any] | None = None
    action: Action | None = None

    @property
    def name(self) -> str:
        return self.record["method"]["name"]

    @property
    def formula(self) -> str:
        return self.record["method"]["formula"]

    @property
    def warnings(self) -> list[str]:
        return self.record["warnings"]


MethodLike = str | Configured | Method | Plan | Edit | Guard | Exact


def resolve(which: MethodLike, **settings: Any) -> tuple[Configured | None, Action | None]:
    """A method from its name and settings, or an action built by hand (a plan of one's own needs no registration)."""
    if isinstance(which, str):
        return find(which).configure(**settings), None
    if isinstance(which, Method):
        return which.configure(**settings), None
    if settings:
        raise BadSetting(
            f"expected settings only with a method's name, found {sorted(settings)} beside a {type(which).__name__}; "
            "put them into it"
        )
    if isinstance(which, Configured):
        return which, None
    if isinstance(which, (Plan, Edit, Guard, Exact, Protection)):
        return None, which
    raise BadSetting(
        f"expected a method's name, a configured method or a Plan, found {type(which).__name__}; pass one of these"
    )


def unlearn(
    case: Case,
    method: MethodLike,
    *,
    seed: int = 0,
    run: str | Path | None = None,
    device: str | None = None,
    mixed_precision: str | None = None,
    floor: float | None = 0.5,
    state: dict[str, Any] | str | Path | None = None,
    checkpoint_seconds: float = 30.0,
    checkpoint_steps: int | None = None,
    trackers: list[Any] | None = None,
    report: Callable[[str, int, int], None] | None = None,
    stop: Stop | None = None,
    curves: Curves | None = None,
    in_place: bool = False,
    **settings: Any,
) -> Outcome:
    """Make `case.model` forget what `case.request` names.

    Args:
        method: a registered name with its settings as keywords (`unlearn(case, "salun", density=0.3)`), or a `Plan`.
        seed: of the unlearning alone. Equal seeds give equal tensors.
        run: a directory for checkpoints, metrics and the model; a run killed in it resumes to the same tensors, and a
            finished one is read back.
        device, mixed_precision: as accelerate names them ("cpu", "cuda"; "bf16"); default: where the model is.
        floor: share of the original's utility on retain below which the best earlier state is restored. None: no floor.
        state: `outcome.state` of an earlier request or what `prepare` returned, or the folder where that is, for methods that
            keep something (ssd, lfssd).
        trackers: names that accelerate knows ("tensorboard"), or `accelerate.tracking.GeneralTracker` objects; they hear
            every logged loss.
        report: called with (text, done, total) for progress.
        stop: ends the run beside the method's own stop, e.g. `parts.reaches(0.1, "probability")`.
        curves: what to measure while it runs, into `record["history"]` and metrics.jsonl; changes nothing else.
        in_place: change `case.model` itself, so that memory holds one model; `outcome.case.model` is then the original, on
            disk and read from there.

    Raises:
        UnmetNeed with everything that is missing, before any compute; BadSetting for a bad or unknown setting.
    """
    configured, action = resolve(method, **settings)
    if configured is not None:
        configured.check(case)
        action = configured.action(case)
    assert action is not None
    if isinstance(state, (str, Path)):
        state = load_state(state)
    config: dict[str, Any] = {
        "method": configured.name if configured else "custom",
        "settings": _plain(configured.values) if configured else {},
        "formula": str(action),
        "seed": seed,
        "floor": floor,
        **({"stop": str(stop)} if stop is not None else {}),
        **({"state": digest_state(state)} if state else {}),
    }
    if stop is not None and not isinstance(action, Plan):
        raise BadSetting(
            f"expected a method of many steps for stop={stop}, found {config['method']}, which has one; drop it"
        )

    def tell(text: str, done: int, total: int) -> None:
        if report is not None:  # a phase without a name of its own goes by the method's
            report(config["method"] if text == "model" else f"{config['method']}: {text}", done, total)

    def go(directory: RunDirectory | None, identity: str) -> Outcome:
        result = execute(
            action, case, seed=seed, device=device, mixed_precision=mixed_precision, floor=floor, run=directory,
            identity=identity, checkpoint_seconds=checkpoint_seconds, checkpoint_steps=checkpoint_steps, trackers=trackers,
            state=state, report=tell if report is not None else None, stop=stop, curves=curves,
            in_place=in_place,
        )  # fmt: skip
        asked = case
        if in_place:  # the request as it was asked: with the model from before, which is now on disk
            asked = copy(case)
            asked.model = result.original or case.model
        return Outcome(
            result.model,
            _record(asked, configured, action, config, result),
            configured,
            asked,
            result.state,
            result.proof,
            action,
        )

    if run is None:
        return go(None, "")
    identity = run_identity(case, config)
    with RunDirectory(run) as directory:
        finished = directory.read_json("outcome.json")
        if finished is not None and finished.get("identity") == identity and is_saved(directory.model_path):
            from copy import deepcopy

            model = load_saved(directory.model_path, deepcopy(case.model))
            left = load_state(run) if finished.get("state") else {}
            return Outcome(model, finished["record"], configured, case, left, finished.get("proof"), action)
        directory.write_config(config)
        directory.write_environment()
        directory.write_json("request.json", case.describe()["request"])
        outcome = go(directory, identity)
        if directory.reads_only:  # one of several processes, and not the one that writes
            together()
            return outcome
        if is_protected(outcome.model):
            save_protected(outcome.model, directory.model_path)  # it can serve the next request
        else:
            directory.save_model(outcome.model)
            case.data.save_beside(directory.model_path)
        if outcome.state:
            save_state(outcome.state, directory.path)
        elif finished is not None and finished.get("state"):  # an earlier run's, which is no longer here
            (directory.path / STATE).unlink(missing_ok=True)
        left = {"record": outcome.record, "proof": outcome.proof, "state": bool(outcome.state)}
        directory.write_json("outcome.json", {"identity": identity, **left})
        (directory.path / "checkpoint.safetensors").unlink(missing_ok=True)
        together()
        return outcome


def protect(case: Case, method: str, *, seed: int = 0, **settings: Any) -> nn.Module:
    """Train a model that can answer later requests by this method (SISA's shards, ACU's analytic head, ...).

    The case's own model gives the architecture; its request is not looked at: all training rows are learned. Returns the
    trained model; put it into a case with a request and call `unlearn(case, method)`.
    """
    found = find(method)
    if found.learn is None:
        raise UnmetNeed(
            f"expected a method that acts at training time, one of {_with('learn')}, found '{method}', which works on any "
            "trained model; call unlearn(case, method) directly"
        )
    return found.learn(case, seed=seed, **found.configure(**settings).values)


def prepare(
    case: Case, method: str, *, seed: int = 0, run: str | Path | None = None, device: str | None = None,
    report: Callable[[str, int, int], None] | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """What a method can measure on the trained model and its training rows before any request arrives (SSD's importance of all data).

    The case's request is not looked at. Hand what comes back, or the folder `run` where it is kept, to each request:
    `unlearn(case, method, state=...)`; it then needs less time, and with `stored="always"` no retain data.
    """
    found = find(method)
    if found.prepare is None:
        raise UnmetNeed(
            f"expected a method that measures something before a request, one of {_with('prepare')}, found '{method}'; "
            "call unlearn(case, method) directly"
        )
    configured = found.configure(**settings)
    configured.check(case)
    state = found.prepare(case, seed=seed, device=device, report=report, **configured.values)
    if run is not None:
        with RunDirectory(run) as directory:
            save_state(state, directory.path)
    return state


def _with(part: str) -> str:
    """The names of the methods that have this part."""
    return ", ".join(name for name, found in methods().items() if getattr(found, part) is not None)


def _record(
    case: Case, configured: Configured | None, action: Action, config: dict[str, Any], result: Result
) -> dict[str, Any]:
    about = configured.method if configured else None
    return {
        "case": case.describe(),
        "method": {
            "name": config["method"],
            "family": about.family if about else type(action).__name__.lower(),
            "formula": config["formula"],
            "settings": config["settings"],
            "intention": about.intention if about else "removal",
            "guarantee": about.guarantee if about else "empirical",
            "paper": about.paper if about else "",
        },
        "seeds": {"case": case.seed, "unlearning": config["seed"]},
        "versions": versions(),
        "machine": machine(),
        "cost": {"seconds": result.seconds, "peak_memory_mb": result.peak_memory_mb},
        "weights": {"before": weights_digest(case.model), "after": weights_digest(result.model)},
        "changed_fraction": result.changed_fraction,
        "ended": result.trace.ended,
        "restored": result.trace.restored,
        "updates": result.trace.updates,
        "history": result.trace.history,
        "notes": _plain(result.notes),
        "warnings": result.warnings,
    }


def _plain(value: Any) -> Any:
    """JSON-able: tuples as lists, objects as their text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)
