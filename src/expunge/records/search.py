"""Settings of a method found by search, on one half of the case; what they are worth is measured on the other.

    found = search(case, "npo", {"lr": (1e-4, 1e-1, "log"), "beta": [0.05, 0.1, 0.5]}, trials=30)
    found.chosen.settings;  found.front;  outcome = found.unlearn();  found.test(outcome)

Two aims, never one number: forgetting (how far the forget rows stand from rows never seen, 0 is best) and the share of utility that is
kept. `halves(case)` fixes the halves by the case's seed before anything is run; every trial unlearns and is measured on the selection
half alone. The search is optuna's (TPE for several objectives, Ozaki et al., 2020; seeded).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expunge.cases.case import Case
from expunge.cases.halves import halves
from expunge.errors import BadSetting, ExpungeError, need_extra
from expunge.methods.outcome import Outcome, unlearn
from expunge.methods.registry import find
from expunge.tasks.base import evaluating, move_to_model

Range = Sequence[Any]
"""(low, high) or (low, high, "log") as a tuple; a list of values to choose from."""


@dataclass(frozen=True)
class Trial:
    """forget: distance of the forget rows' mean score from where it should be, >= 0, 0 best. kept: utility on retain over the
    original's, 1 is all. error: why there are no numbers."""

    number: int
    settings: dict[str, Any]
    forget: float = float("nan")
    kept: float = float("nan")
    seconds: float = 0.0
    error: str = ""

    def beats(self, other: Trial) -> bool:
        """At least as good in both, better in one."""
        return (
            self.forget <= other.forget
            and self.kept >= other.kept
            and (self.forget, self.kept) != (other.forget, other.kept)
        )


@dataclass(frozen=True)
class Search:
    """What a search found. least: the share of utility that the choice had to keep."""

    case: Case
    method: str
    trials: tuple[Trial, ...]
    least: float
    seed: int

    @property
    def done(self) -> tuple[Trial, ...]:
        return tuple(t for t in self.trials if not t.error)

    @property
    def front(self) -> tuple[Trial, ...]:
        """Trials that no other beats, best forgetting first."""
        found = [t for t in self.done if not any(o.beats(t) for o in self.done)]
        return tuple(sorted(found, key=lambda t: (t.forget, -t.kept)))

    @property
    def chosen(self) -> Trial:
        """The best forgetting of those that keep enough utility; where none does, the highest utility."""
        enough = [t for t in self.front if t.kept >= self.least]
        return enough[0] if enough else max(self.front, key=lambda t: t.kept)

    def unlearn(self, seed: int | None = None, **settings: Any) -> Outcome:
        """The chosen settings on the whole request."""
        return unlearn(
            self.case, self.method, seed=self.seed if seed is None else seed, **settings, **self.chosen.settings
        )

    def test(self, outcome: Outcome) -> dict[str, float]:
        """The same two numbers on the half that the search never saw. Look once."""
        forget, kept = measure(halves(self.case)[1], outcome.model)
        return {"forget": forget, "kept": kept}

    def describe(self) -> dict[str, Any]:
        """Plain data, for a file."""
        return {
            "method": self.method, "least": self.least, "seed": self.seed, "chosen": self.chosen.number,
            "front": [t.number for t in self.front], "trials": [vars(t) for t in self.trials],
        }  # fmt: skip


def search(
    case: Case,
    method: str,
    space: Mapping[str, Range],
    trials: int = 30,
    seed: int = 0,
    *,
    fixed: Mapping[str, Any] | None = None,
    least: float = 0.97,
    report: Callable[[str, int, int], None] | None = None,
) -> Search:
    """Try settings of a method on the selection half of the case.

    Args:
        space: setting -> (low, high), (low, high, "log"), or a list of values. Whole numbers at both ends give whole numbers.
        seed: of the search and of each trial's unlearning. fixed: settings that stay. least: share of utility to keep.

    A setting that counts passes over the data (`epochs`) makes half as many updates here as on the whole request. Trials that fail
    (a setting the method refuses, a loss that is not finite) are kept with their error and never chosen.
    """
    optuna = need_extra("optuna", "search")
    stay = dict(fixed or {})
    check_space(method, space, stay)
    selection, _ = halves(case)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["minimize", "maximize"],
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, trials)),
    )
    found: list[Trial] = []
    for number in range(trials):
        ask = study.ask()
        own = {name: drawn(ask, name, values) for name, values in space.items()}
        start = time.perf_counter()
        try:
            outcome = unlearn(selection, method, seed=seed, floor=None, **stay, **own)
            forget, kept = measure(selection, outcome.model)
            error = "" if forget == forget and kept == kept else "a measurement is not a number"
        except ExpungeError as problem:
            forget, kept, error = float("nan"), float("nan"), str(problem)
        found.append(Trial(number, {**stay, **own}, forget, kept, time.perf_counter() - start, error))
        if error:
            study.tell(ask, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(ask, [forget, kept])
        if report is not None:
            report(f"search {method}", number + 1, trials)
    if all(t.error for t in found):
        raise BadSetting(
            f"expected settings that {method} can run with, found that all {len(found)} trials failed (last: {found[-1].error}); "
            "narrow the space"
        )
    return Search(case, method, tuple(found), least, seed)


def check_space(method: str, space: Mapping[str, Range], fixed: Mapping[str, Any]) -> None:
    """Wrong names, empty ranges and values out of a setting's limits are told before any compute."""
    if not space:
        raise BadSetting("expected at least one setting to search, found none; pass {'lr': (1e-4, 1e-1, 'log')}")
    both = sorted(set(space) & set(fixed))
    if both:
        raise BadSetting(f"expected a setting to be searched or fixed, found both for {', '.join(both)}; drop one")
    for end in (0, 1):
        sample = {}
        for name, values in space.items():
            ranged = isinstance(values, tuple)
            if ranged and (len(values) not in (2, 3) or values[0] > values[1] or values[2:] not in ((), ("log",))):
                raise BadSetting(f"expected (low, high) or (low, high, 'log') for {name}, found {values!r}; correct it")
            if not ranged and not values:
                raise BadSetting(f"expected values to choose {name} from, found none; list some")
            sample[name] = values[end] if ranged else values[-end]
        find(method).configure(**fixed, **sample)


def drawn(ask: Any, name: str, values: Range) -> Any:
    """One value, from an optuna trial."""
    if not isinstance(values, tuple):
        return values[ask.suggest_categorical(name, list(range(len(values))))]
    low, high, log = values[0], values[1], values[2:] == ("log",)
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (low, high))
    return (
        ask.suggest_int(name, low, high, log=log)
        if whole
        else ask.suggest_float(name, float(low), float(high), log=log)
    )


def measure(case: Case, model: torch.nn.Module) -> tuple[float, float]:
    """(forget, kept) of a model on a case's splits: what an owner has before retraining.

    The forget score should be that of unseen rows of the same kind (0 for a whole class, which the original knows unseen too)."""
    target = 0.0
    if case.request.describe()["kind"] != "class" and "holdout" in case.splits:
        target = _score(case, model, "holdout")
    now, before = (
        case.task.evaluate(m, case.split("retain").batches())[case.task.utility] for m in (model, case.model)
    )
    return abs(_score(case, model, "forget") - target), now / before if before > 0 else before / now


def _score(case: Case, model: torch.nn.Module, split: str) -> float:
    found = []
    with evaluating(model):
        for batch in case.split(split).batches():
            batch = move_to_model(batch, model)
            found.append(case.task.forget_score(case.task.forward(model, batch), batch).double())
    return float(torch.cat(found).mean())
