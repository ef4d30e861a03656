"""Unlearning time over retraining time, for every registered tuned and edited method on a CIFAR-10 subset.

    python -m expunge.benchmarks.speed                       # needs EXPUNGE_DATA; about 8 minutes on one core
    python -m expunge.benchmarks.speed --only ssd salun scrub l1_sparse
    python -m expunge.benchmarks.speed --device cuda --rows 20000 --trained 80       # ResNet-18; written to gpu_speed.md

The case is `testbed.cifar_case`'s (forget class 3): ResNet8 on CPU, ResNet-18 with shifted and mirrored pictures on a GPU. Methods
run by `unlearn` with their defaults. Time does not depend on what the model knows, so on CPU the original is trained for
`--trained` epochs only. Retraining is not run in full: its time per epoch is measured by training fresh models for one epoch before
every method and after the last, so that load on the machine meets both, and multiplied by the recipe's epochs. The ratio uses the
median of the epochs next to the method (at least `--around` of them). Seconds are of the whole call of `unlearn`: processor time on
one thread (`measuring.py`) on CPU, wall time on a GPU.
The utility floor, a safety check of the engine, is no part of a method and is off; for the methods with a goal the ratio with it
on, as `unlearn` has it by default, is given beside.
How many epochs a retraining takes decides the ratio: ours takes 80, the original of SalUn's paper 182, so both are given.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

import expunge
from expunge.benchmarks.measuring import clock_of, options, publish, spelled, table
from expunge.benchmarks.testbed import CIFAR_RECIPE, CIFAR_ROWS, ResNet18, cifar_case, shifted_or_mirrored
from expunge.cases import Case
from expunge.engine import fit
from expunge.errors import ExpungeWarning
from expunge.methods.registry import Method, methods

NAME = "speed"
GOALS = {"ssd": 0.02, "salun": 0.15, "scrub": 0.15, "l1_sparse": 0.15}
PAPER_EPOCHS = 182


def setup(rows: int, trained: int, device: str = "cpu") -> Case:
    """The case, with an original trained for `trained` epochs and the recipe that retraining would follow."""
    recipe = replace(CIFAR_RECIPE, epochs=trained)
    if device == "cpu":
        return cifar_case(0, "class", rows, recipe).with_(recipe=CIFAR_RECIPE)
    case = cifar_case(0, "class", rows, recipe, build=ResNet18, device=device, augment=shifted_or_mirrored)
    return case.with_(recipe=CIFAR_RECIPE)


def served(case: Case, only: list[str] | None, skip: Sequence[str] = ()) -> tuple[dict[str, Method], dict[str, str]]:
    """The tuned and edited methods that can take the case, in the order of `only`, and why the others cannot."""
    able, unable = {}, {name: "left out by --skip" for name in skip}
    known = methods()
    for name in only or known:
        about = known[name]
        if about.family not in ("tuned", "edited") or name in skip:
            continue
        unmet = about.unmet(case)
        if unmet:
            unable[name] = unmet[0]
        else:
            able[name] = about
    return able, unable


def one_epoch(case: Case, seed: int) -> float:
    """Seconds of one epoch of retraining."""
    return spent(case, lambda: fit(case, "retain", seed, recipe=replace(case.recipe, epochs=1)))


def spent(case: Case, action: Callable[[], object]) -> float:
    """Seconds of processor time on CPU, of wall time on a GPU until its work is done."""
    device = next(case.model.parameters()).device.type
    clock = clock_of(device)
    start = clock()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def run(
    case: Case, able: dict[str, Method], around: int, repeats: int, between: int = 2, until: float = float("inf")
) -> list[dict[str, Any]]:
    """One row per method; short methods are repeated. between: epochs of retraining that are timed before each method. until:
    seconds after which no further method begins."""
    began = time.perf_counter()
    one_epoch(case, 0)
    epochs: list[float] = []
    found: list[tuple[str, Method, list[float], float | None, int]] = []
    for name, about in able.items():
        if time.perf_counter() - began > until:
            break
        epochs += [one_epoch(case, len(epochs) + i) for i in range(between)]
        seconds: list[float] = []
        guarded: list[float] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExpungeWarning)
            while not seconds or (len(seconds) < repeats and sum(seconds) < 4):
                seconds.append(spent(case, lambda: expunge.unlearn(case, about.configure(), floor=None)))
                if name in GOALS:
                    guarded.append(spent(case, lambda: expunge.unlearn(case, about.configure())))
        found.append((name, about, seconds, median(guarded) if guarded else None, len(epochs)))
        print(
            f"{name}: {median(seconds):.2f} s; an epoch {median(epochs[-around:]):.3f} s", file=sys.stderr, flush=True
        )
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
    parser = options(NAME, __doc__)
    parser.add_argument("--only", nargs="+", help="these methods only")
    parser.add_argument("--skip", nargs="+", default=[], help="all but these methods")
    parser.add_argument("--rows", type=int, default=CIFAR_ROWS)
    parser.add_argument("--trained", type=int, default=5, help="epochs of training the original")
    parser.add_argument("--around", type=int, default=10, help="retraining epochs that a method is compared with")
    parser.add_argument("--between", type=int, default=2, help="retraining epochs timed before each method")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a method that takes under 4 s in all")
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="seconds after which no further method begins"
    )
    parser.add_argument("--device", default="cpu", help="cpu: ResNet8; cuda: ResNet-18")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    case = setup(given.rows, given.trained, given.device)
    known = {name: case.task.evaluate(case.model, case.split(name).batches(1024)) for name in ("retain", "test")}
    able, unable = served(case, given.only, given.skip)
    rows = run(case, able, given.around, given.repeats, given.between, given.until)
    done = {row["method"] for row in rows}
    unable |= {name: "no time was left (--until)" for name in able if name not in done}
    retain = len(case.split("retain"))
    model = "ResNet8" if given.device == "cpu" else "ResNet-18, pictures shifted and mirrored in training"
    body = (
        f"Class 3 of {given.rows} CIFAR-10 rows, {model}; retraining: {retain} rows, batch {case.recipe.batch_size}, its time per "
        f"epoch measured (median of {given.around} epochs taken between the methods) times the epochs. Goals are for "
        f"{case.recipe.epochs} epochs. The original was trained for {given.trained} epochs: accuracy {known['retain']['accuracy']:.3f} "
        f"on kept training rows, {known['test']['accuracy']:.3f} on unseen ones of the kept classes.\n\n{table(rows)}"
    )
    for why in dict.fromkeys(unable.values()):
        body += f"\nNot run: {', '.join(name for name in unable if unable[name] == why)}: {why}.\n"
    name = NAME if given.device == "cpu" else f"gpu_{NAME}"
    publish(name, spelled(NAME, arguments), time.perf_counter() - start, body, given.out or None)
    return rows


if __name__ == "__main__":
    main()
