"""A digit out of the class-conditional toy: erasers, and the generic methods that know nothing of images, beside `retrained`.

    python -m expunge.benchmarks.class_erasers                     # two seeds, all rows
    python -m expunge.benchmarks.class_erasers --only ssd,esd --seeds 0

Digit 0 is to go, and what stands in for it is 1. The judge is a support vector machine of real digits. Settings are the toys'
(`canvas_settings.CLASS`); for the generic methods a small grid around where they begin to move the class.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from expunge.benchmarks import canvas_settings
from expunge.benchmarks.embedded import Embedded
from expunge.benchmarks.measuring import options, publish, spelled
from expunge.benchmarks.unlearncanvas import table
from expunge.records.compare import compare

NAME = "class_erasers"
CHECKS = ("generation_accuracy", "generation_answers", "image_distance", "storage")
Row = tuple[str, dict[str, Any]]

TOLD: dict[str, dict[str, Any]] = {
    "salun_generation": {"to": "1"}, "esd": {}, "erasediff": {"to": "another"}, "scissorhands": {"to": "1"},
    "selective_amnesia": {}, "sfd": {"to": "next"},
}  # fmt: skip
"""What an eraser must be told of the class."""
GENERIC: tuple[Row, ...] = (
    ("grad_ascent", {"optimizer": "adam", "lr": 1e-4, "epochs": 10, "batch_size": 32}),
    ("fine_tune", {"lr": 0.01, "epochs": 2, "batch_size": 64}),
    ("ssd", {"alpha": 10.0}), ("ssd", {"alpha": 15.0}), ("ssd", {"alpha": 20.0}),
    ("npo", {"optimizer": "adam", "lr": 1e-4, "beta": 0.1, "epochs": 2, "batch_size": 64}),
    ("npo", {"optimizer": "adam", "lr": 2e-4, "beta": 1.0, "epochs": 2, "batch_size": 32}),
    ("scrub", {"optimizer": "adam", "alpha": 1.0, "lr": 2.5e-4, "epochs": 2, "msteps": 1}),
    ("scrub", {"optimizer": "adam", "alpha": 1.0, "lr": 5e-4, "epochs": 2, "msteps": 2}),
    ("grad_diff", {"lr": 2e-4, "epochs": 3}), ("grad_diff", {"lr": 5e-4, "epochs": 3}),
    ("neggrad_plus", {"lr": 0.05, "alpha": 0.9, "epochs": 2}),
    ("salun", {"lr": 0.1, "epochs": 2, "batch_size": 64}), ("salun", {"lr": 0.03, "epochs": 10, "batch_size": 64}),
)  # fmt: skip


def rows(only: Sequence[str] = ()) -> list[Row]:
    """Methods with their settings. only: names of methods."""
    erasers = [(name, {**told, **canvas_settings.CLASS.get(name, {})}) for name, told in TOLD.items()]
    return [row for row in (*erasers, *GENERIC) if not only or row[0] in only]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(NAME, __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", default="", help="names of methods, with commas between")
    parser.add_argument("--small", action="store_true", help="the tests' model")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    settings: dict[str, Any] = {"small": True, "answers": 2, "sampling_steps": 4} if given.small else {}

    def toy(seed: int) -> Embedded:
        return Embedded(label=0, seed=seed, settings=settings)

    found = compare(
        lambda seed: toy(seed).case, rows([name for name in given.only.split(",") if name]), given.seeds, floor=None,
        gold=lambda seed: toy(seed).retrained(), second=lambda seed: toy(1 - seed if seed in (0, 1) else seed + 1).retrained(),
        checks=CHECKS, attacks=False, workers=given.workers, command=spelled(NAME, arguments),
        report=lambda text, done, total: print(f"{text} ({done}/{total})", flush=True),
    )  # fmt: skip
    exam = toy(given.seeds[0]).exam()
    note = (
        f"Digit 0 to go; {exam.judges[0]}; {len(exam.seeds)} images a class, {exam.sampling.steps} steps, guidance 1 in the (1 + w) "
        "convention. IRA is the accuracy on the nine kept classes; UA, IRA, leak and rejected in %; rejected: share of the "
        "target's answers that are like no real digit.\n\n"
    )
    publish(NAME, spelled(NAME, arguments), time.perf_counter() - start, note + table(found), given.out or None)


if __name__ == "__main__":
    main()
