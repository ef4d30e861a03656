"""TOFU in full on a Llama of 109 M parameters: all 4,000 rows learned from nothing, forget10 unlearned by twelve methods.

    python -m expunge.benchmarks.tofu_large                       # some minutes on one GPU
    python -m expunge.benchmarks.tofu_large --size tiny --device cpu --methods npo    # the same path in small

`original` learns `full`, `retrained` and a second seed of it (the floor) learn retain90, by one recipe in bfloat16. Each
method then runs on `original` by `unlearn`, and `Auditor` measures TOFU's numbers, relearning and quantisation. There is no
pre-trained model in this: real authors and world facts, which no row of TOFU teaches, are left out of model utility (three
components of nine), and without a holdout split there is no membership. Seeds are the unlearning's; they share the three
trained models.

The work is shared among processes on one device: single small updates leave it idle. A process claims a run by making a file;
none begins that is not expected to end before `--deadline`, so that a table is always written of what ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from expunge.audits.attacks.budget import Budget
from expunge.audits.golds import gold_key, original, retrain
from expunge.benchmarks import table_file
from expunge.benchmarks.measuring import options, spelled
from expunge.benchmarks.nano import CONTEXT, TEMPLATE, byte_level_bpe, llama
from expunge.benchmarks.tables import heading
from expunge.cases import Case, requests
from expunge.cases.tofu import PER_AUTHOR, candidates, refusals, tofu, tofu_table
from expunge.files import write_atomic
from expunge.methods import find
from expunge.methods.outcome import unlearn
from expunge.parts.plan import Optimizer, Training
from expunge.records.audit import Auditor
from expunge.records.comparison import Comparison
from expunge.records.results import Results
from expunge.records.terminal import markdown

NAME = "tofu_large"
AUTHORS = 200


@dataclass(frozen=True)
class Size:
    """A Llama and its slice of TOFU. keep, forget: authors, from the first and from the last on. rate: of the training."""

    width: int
    layers: int
    heads: int
    vocabulary: int = 8192
    keep: int = 180
    forget: int = 20
    epochs: int = 24
    batch: int = 64
    rate: float = 5e-4


SIZES = {
    "large": Size(1024, 8, 16),
    "narrow": Size(64, 2, 2, epochs=1),
    "tiny": Size(64, 2, 2, vocabulary=512, keep=2, forget=1, epochs=30, batch=8, rate=3e-3),
}
SHARED: dict[str, Any] = {
    "optimizer": "adamw", "lr": 5e-5, "epochs": 10, "batch_size": 32, "weight_decay": 0.01, "clip": 1.0, "schedule": "linear",
    "warmup": 1.0,
}  # fmt: skip
"""open-unlearning's budget (10 passes of the forget rows, 32 + 32 rows, a linear decay after one epoch's rise) at a step for a
model of this width that was trained at 5e-4."""
METHODS: dict[str, dict[str, Any]] = {
    "grad_ascent": {}, "grad_diff": {}, "npo": {}, "simnpo": {"gamma": 1.0}, "dpo": {}, "idk": {}, "rmu": {},
    "undial": {"alpha": 1.0}, "wga": {}, "satimp": {}, "kl_min": {}, "flat": {"lr": 2e-5},
}  # fmt: skip
"""Method -> what it has of its own beside the shared budget (as in `language_tables`)."""

CHECKS: list[Any] = [
    "probability", "exact_memorisation", "extraction_strength", "truth_ratio", "forget_quality", "model_utility",
    {"name": "rouge", "splits": ["forget"]}, "relearning", "quantisation_8", "quantisation_4",
]  # fmt: skip
ATTACKS = ["relearning", "quantisation_8", "quantisation_4"]
BUDGET = Budget(steps=6, examples=0.1, learning_rate=1e-4, batch_size=16)
"""Six updates on a tenth of the forgotten rows, at a fifth of the training's step (as on the embedded model)."""
GOLDS = (("original", original, 0), ("retrain", retrain, 1001), ("retrain", retrain, 1002))
LONGEST = 120.0
"""Seconds that a run is expected to take before one has ended: the first of a process audits the references as well."""


@cache
def large_case(size: Size, device: str) -> Case:
    """The case with an untrained model, on its device."""
    rows = tofu("full")
    texts = [f"{row['question']}\n{row['answer']}" for row in rows] + refusals()
    tokenizer = byte_level_bpe(texts, size.vocabulary)
    table = partial(tofu_table, tokenizer, template=TEMPLATE, max_length=CONTEXT)
    probe = partial(candidates, tokenizer, template=TEMPLATE, max_length=CONTEXT)
    count = PER_AUTHOR * size.forget
    chosen = rows[: PER_AUTHOR * size.keep] + rows[-count:]
    saved = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = llama(size.vocabulary, size.width, size.layers, size.heads).to(device)
    torch.random.set_rng_state(saved)
    return Case(
        model, table(chosen, decline=refusals()), requests.where("author", ">=", size.keep), task="language", name=NAME,
        recipe=Training(size.epochs, size.batch, Optimizer(
            "adamw", lr=size.rate, weight_decay=0.01, clip=1.0, schedule="linear", warmup=0.05,
        )),
        probes={
            "forget_perturbed": probe(tofu("forget10_perturbed")[-count:]),
            "retain_perturbed": probe(tofu("retain_perturbed")[:count]),
        },
    )  # fmt: skip


def precision(device: str) -> AbstractContextManager[Any]:
    """bfloat16 where training runs on a GPU."""
    return nullcontext() if device == "cpu" else torch.autocast(device, dtype=torch.bfloat16)


def trained_file(case: Case, number: int, folder: Path) -> Path:
    kind, _, seed = GOLDS[number]
    return folder / f"{gold_key(case, case.split('train' if kind == 'original' else 'retain'), kind, seed)}.safetensors"


@dataclass
class Worker:
    """One process: its share of the trainings, then runs until none is left or none would end in time.

    until: wall clock (`time.time`) of the deadline. step: the shared step size, 0 for `SHARED`'s.
    """

    number: int
    count: int
    size: Size
    device: str
    folder: Path
    until: float
    step: float = 0.0

    def train(self) -> Case:
        """The case with its original, once all three models are there."""
        case, golds = large_case(self.size, self.device), self.folder / "golds"
        for place in range(self.number, len(GOLDS), self.count):
            _, make, seed = GOLDS[place]
            with precision(self.device):
                found = make(case, seed, golds)
            self.say(f"{found.kind} {seed}: {found.seconds:.0f} s")
        while not all(trained_file(case, place, golds).exists() for place in range(len(GOLDS))):
            if time.time() > self.until or (self.folder / "failed").exists():
                raise TimeoutError(
                    "expected all three models before the deadline, found some missing; see the others' words"
                )
            time.sleep(0.2)
        return case.with_(model=original(case, 0, golds).model)

    def runs(self, case: Case, jobs: Sequence[tuple[int, str]]) -> None:
        auditor = Auditor(
            case, checks=CHECKS, attacks=ATTACKS, budget=BUDGET, seed=0, cache=self.folder / "golds",
        )  # fmt: skip
        longest = LONGEST
        for seed, name in jobs:
            kept = self.folder / f"{name}-{seed}.json"
            if time.time() + longest > self.until or kept.exists() or not claimed(kept):
                continue
            began = time.time()
            try:
                seconds = self.one(auditor, seed, name, kept)
            except Exception:  # the other methods' rows are no worse for it, and the table says what is missing
                self.say(f"seed {seed} {name} failed:\n{traceback.format_exc()}")
                continue
            longest = 1.2 * (time.time() - began)
            self.say(
                f"seed {seed} {name}: unlearned in {seconds:.1f} s, audited in {time.time() - began - seconds:.1f} s"
            )

    def one(self, auditor: Auditor, seed: int, name: str, kept: Path) -> float:
        """One method and seed, unlearned and audited; the seconds of unlearning."""
        began, known = time.time(), find(name).settings.model_fields
        settings = {k: v for k, v in SHARED.items() if k in known} | METHODS[name]
        if self.step:
            settings["lr"] = self.step * settings["lr"] / SHARED["lr"]
        outcome = unlearn(
            auditor.case, name, seed=seed, floor=None, device=self.device,
            mixed_precision=None if self.device == "cpu" else "bf16", **settings,
        )  # fmt: skip
        seconds = time.time() - began
        auditor.audit(outcome).results.save(kept)
        return seconds

    def say(self, text: str) -> None:
        print(f"[{self.number}] {text}", file=sys.stderr, flush=True)


def claimed(kept: Path) -> bool:
    """Whether this process is the first to take the run."""
    try:
        kept.with_suffix(".claim").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def work(worker: Worker, jobs: Sequence[tuple[int, str]]) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        worker.runs(worker.train(), jobs)
    except BaseException:
        (worker.folder / "failed").touch()
        raise


def numbers(results: Sequence[Results]) -> list[dict[str, Any]]:
    """What the table is made of, run by run, without lists over examples."""
    return [
        {
            "method": r.method.name, "settings": r.method.settings, "seeds": r.seeds.model_dump(), "cost": r.cost.model_dump(),
            "verdict": r.verdict.model_dump(include={"verdict", "reason"}) if r.verdict else None,
            "measured": {
                "/".join(m.key): {
                    s: v for s in ("original", "unlearned", "retrained", "floor") if (v := getattr(m, s)) is not None
                }
                for m in (*r.measurements, *r.attacks)
            },
        }
        for r in results
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Comparison | None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = options(NAME, __doc__)
    parser.add_argument("--size", default="large", choices=SIZES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=0, help="of the trainings; default: the size's")
    parser.add_argument("--lr", type=float, default=0.0, help="the methods' shared step size; default: 5e-5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--workers", type=int, default=2 if torch.cuda.is_available() else 1)
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds; no run begins that would end later")
    parser.add_argument("--folder", default=f"runs/{NAME}", help="of trained models and finished runs; read back")
    parser.add_argument("--worker", type=int, help="internal: one process of several")
    parser.add_argument("--until", type=float, default=0.0, help="internal")
    chosen = parser.parse_args(given)
    began = time.time()
    folder = Path(chosen.folder) / chosen.size
    folder.mkdir(parents=True, exist_ok=True)
    size = replace(SIZES[chosen.size], **({"epochs": chosen.epochs} if chosen.epochs else {}))
    jobs = [(seed, name) for seed in range(chosen.seeds) for name in chosen.methods.split(",")]
    if chosen.worker is not None:
        torch.set_num_threads(1)
        work(Worker(chosen.worker, chosen.workers, size, chosen.device, folder, chosen.until, chosen.lr), jobs)
        return None
    for stale in (*folder.glob("*.claim"), folder / "failed"):
        stale.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"expunge.benchmarks.{NAME}", *given, "--until", str(began + chosen.deadline)]
    processes = [subprocess.Popen([*command, "--worker", str(i)]) for i in range(chosen.workers)]
    ended = [p.wait() for p in processes]
    found = [Results.load(f) for seed, name in jobs if (f := folder / f"{name}-{seed}.json").exists()]
    if not found:
        raise RuntimeError(
            f"expected finished runs, found none (exit statuses {ended}); see the processes' words above"
        )
    comparison = Comparison.of(found, command=spelled(NAME, given))
    table = markdown(comparison)
    print(table)
    if chosen.out:
        rate = chosen.lr or SHARED["lr"]
        publish(Path(chosen.out), comparison, table, size, rate, len(jobs), time.time() - began)
    return comparison


def publish(
    out: Path, comparison: Comparison, table: str, shape: Size, rate: float, jobs: int, seconds: float
) -> None:  # fmt: skip
    """The table, and the numbers it is made of."""
    found = comparison.results
    weights = sum(p.numel() for p in llama(shape.vocabulary, shape.width, shape.layers, shape.heads).parameters())
    note = (
        f"A Llama of {weights / 1e6:.0f} M parameters ({shape.layers} x {shape.width}, a vocabulary of {shape.vocabulary}), trained from "
        f"nothing on {PER_AUTHOR * (shape.keep + shape.forget)} rows ({shape.epochs} epochs, batch {shape.batch}, AdamW {shape.rate:g}), "
        f"forgetting the last {PER_AUTHOR * shape.forget}. {len(found)} of {jobs} runs ended before the deadline. Every method at one "
        f"budget: AdamW {rate:g} (flat at {rate * 0.4:g}), 10 passes of the forget rows, 32 + 32 rows, linear decay, clip 1; seeds "
        "are the unlearning's. Processes shared the device, so seconds are of a busy one. Not ranked by forget quality."
    )
    section = table_file.Section.of(note, table, f"`{comparison.command}` in {seconds:.0f} s")
    write_atomic(out / f"{NAME}.md", table_file.write(heading("TOFU on 109 M parameters"), {"forget10": section}))
    write_atomic(out / f"{NAME}.json", json.dumps(numbers(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
