"""Unlearning time over retraining time, for every registered tuned and edited method on a CIFAR-10 subset.

    python -m expunge.benchmarks.speed                       # needs EXPUNGE_DATA; about 8 minutes on one core
    python -m expunge.benchmarks.speed --only ssd salun scrub l1_sparse

The case is `testbed.cifar_case`'s (ResNet8, forget class 3); methods run by `unlearn` with their defaults. Time does not depend on
what the model knows, so the original is trained for `--trained` epochs only. Retraining is not run in full: its time per epoch is
measured by training fresh models for one epoch before every method and after the last, so that load on the machine meets both,
and multiplied by the recipe's epochs. The ratio uses the median of the epochs next to the method (at least `--around` of them).
Seconds are processor time on one thread (`measuring.py`), of the whole call of `unlearn`.
The utility floor, a safety check of the engine, is no part of a method and is off; for the methods with a goal the ratio with it
on, as `unlearn` has it by default, is given beside.
How many epochs a retraining takes decides the ratio: ours takes 80, the original of SalUn's paper 182, so both are given.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import expunge
from expunge.benchmarks.measuring import options, publish, spelled, table
from expunge.benchmarks.testbed import CIFAR_RECIPE, CIFAR_ROWS, cifar_case
from expunge.cases import Case
from expunge.engine import fit
from expunge.errors import ExpungeWarning
from expunge.methods.registry import Method, methods

NAME = "speed"
GOALS = {"ssd": 0.02, "salun": 0.15, "scrub": 0.15, "l1_sparse": 0.15}
PAPER_EPOCHS = 182


def setup(rows: int, trained: int) -> Case:
    """The case, with an original trained for a few epochs and the recipe that retraining would follow."""
    return cifar_case(0, "class", rows, replace(CIFAR_RECIPE, epochs=trained)).with_(recipe=CIFAR_RECIPE)


def served(case: Case, only: list[str] | None) -> tuple[dict[str, Method], dict[str, str]]:
    """The tuned and edited methods that can take the case, and why the others cannot."""
    able, unable = {}, {}
    for name, about in methods().items():
        if about.family not in ("tuned", "edited") or (only and name not in only):
            continue
        unmet = about.unmet(case)
        if unmet:
            unable[name] = unmet[0]
        else:
            able[name] = about
    return able, unable


def one_epoch(case: Case, seed: int) -> float:
    """Seconds of one epoch of retraining."""
    return spent(lambda: fit(case, "retain", seed, recipe=replace(case.recipe, epochs=1)))


def spent(action: Callable[[], object]) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    action()
    return time.process_time() - start


def run(case: Case, able: dict[str, Method], around: int, repeats: int) -> list[dict[str, Any]]:
    """One row per method; short methods are repeated."""
    one_epoch(case, 0)
    epochs: list[float] = []
    found: list[tuple[str, Method, list[float], float | None, int]] = []
    for name, about in able.items():
        epochs += [one_epoch(case, len(epochs) + i) for i in range(2)]
        seconds: list[float] = []
        guarded: list[float] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExpungeWarning)
            while not seconds or (len(seconds) < repeats and sum(seconds) < 4):
                seconds.append(spent(lambda: expunge.unlearn(case, about.configure(), floor=None)))
                if name in GOALS:
                    guarded.append(spent(lambda: expunge.unlearn(case, about.configure())))
        found.append((name, about, seconds, median(guarded) if guarded else None, len(epochs)))
        print(f"{name}: {median(seconds):.1f} s", file=sys.stderr)
    epochs += [one_epoch(case, len(epochs) + i) for i in range(max(2, around - len(epochs)))]
    rows = []
    for name, about, seconds, guarded, place in found:
        low = max(min(place - around // 2, len(epochs) - around), 0)
        epoch, goal = median(epochs[low : low + around]), GOALS.get(name)
        ratio = median(seconds) / (epoch * case.recipe.epochs)
        rows.append({
            "method": name, "family": about.family, "passes": about.configure().values.get("epochs"), "s": median(seconds),
            "retraining epoch, s": epoch, f"ratio ({case.recipe.epochs} epochs)": ratio,
            f"ratio ({PAPER_EPOCHS} epochs)": median(seconds) / (epoch * PAPER_EPOCHS), "goal": goal,
            "met": None if goal is None else ratio <= goal,
            "with the floor": None if guarded is None else guarded / (epoch * case.recipe.epochs),
            "met with it": None if guarded is None or goal is None else guarded / (epoch * case.recipe.epochs) <= goal,
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["s"])


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    import torch

    parser = options(NAME, __doc__)
    parser.add_argument("--only", nargs="+", help="these methods only")
    parser.add_argument("--rows", type=int, default=CIFAR_ROWS)
    parser.add_argument("--trained", type=int, default=5, help="epochs of training the original")
    parser.add_argument("--around", type=int, default=10, help="retraining epochs that a method is compared with")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a method that takes under 4 s in all")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    case = setup(given.rows, given.trained)
    able, unable = served(case, given.only)
    rows = run(case, able, given.around, given.repeats)
    retain = len(case.split("retain"))
    body = (
        f"Class 3 of {given.rows} CIFAR-10 rows, ResNet8; retraining: {retain} rows, batch {case.recipe.batch_size}, its time per "
        f"epoch measured (median of {given.around} epochs taken between the methods) times the epochs. Goals are for "
        f"{case.recipe.epochs} epochs.\n\n{table(rows)}"
    )
    body += "".join(f"\nNot run: {name}: {why}.\n" for name, why in unable.items())
    publish(NAME, spelled(NAME, arguments), time.perf_counter() - start, body, given.out or None)
    return rows


if __name__ == "__main__":
    main()
