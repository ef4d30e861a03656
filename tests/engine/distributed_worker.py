"""What each process of test_distribution runs: several plans on a tiny language model; the first process writes what came out."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.test_loop import make_case
from expunge import Optimizer, Plan, Term
from expunge.engine import RunDirectory, checkpoint, execute
from expunge.engine.checkpoint import Checkpointer
from expunge.engine.distribution import Distribution, follows
from expunge.parts import average, low_rank, match, npo, project, salient, sam, utility_floor
from expunge.parts import fit as likelihood
from expunge.tasks.language import Language
from tiny_language import language_case

ADAM = Optimizer("adamw", lr=3e-3, weight_decay=0.01, clip=1.0)
SGD = Optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=0.01)
FORGET, RETAIN = Term(npo(0.2)), Term(likelihood("tokens"), "retain")
COMMON = dict(epochs=2, batch_size=5, epoch_of="forget")
PLANS = {
    "npo": Plan(FORGET, RETAIN, optimizer=ADAM, average=average(start=2), **COMMON),
    "salient": Plan(FORGET, RETAIN, optimizer=SGD, scope=salient(0.3), **COMMON),
    "low_rank": Plan(Term(match()), RETAIN, optimizer=ADAM, scope=low_rank(4), **COMMON),
    "balance": Plan(FORGET, RETAIN, optimizer=SGD, balance=project(), **COMMON),
    "sam": Plan(FORGET, RETAIN, optimizer=SGD, adversary=sam(0.01), **COMMON),
    "classifier": Plan(
        Term(npo(0.2)), Term(likelihood(), "retain"), optimizer=SGD, epochs=2, batch_size=7, mode="eval"
    ),
    "floor": Plan(Term(npo(0.2), weight=3.0), optimizer=Optimizer("sgd", lr=2.0), stop=utility_floor(0.95), **COMMON),
}
WITH_COPIES = ("npo", "low_rank", "classifier")
SMALL = ("classifier",)  # weights too few to be cut


class Killed(Exception):
    """Stands for the end of the process."""


def main(out: Path, modes: list[str]) -> None:
    torch.set_num_threads(1)
    found: dict[str, dict] = {mode: {} for mode in modes}
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    every = bool(os.environ.get("EXPUNGE_TEST_SHARDS")) and alone
    for mode in modes:
        shards = mode == "shards"
        os.environ |= {"ACCELERATE_USE_FSDP": str(shards).lower(), "FSDP_VERSION": "2"}
        for name in (n for n in (PLANS if shards or every else WITH_COPIES) if not (shards and n in SMALL)):
            found[mode][name] = one(out, mode, name, PLANS[name])
        if not alone:
            found[mode]["resumed"] = resumed(out, mode)
    if not follows():
        (out / "found.json").write_text(json.dumps(found))


def one(out: Path, mode: str, name: str, plan: Plan, **more) -> dict:
    seen: list[bool] = []
    shard = Distribution.shard
    Distribution.shard = lambda self, model: seen.append(is_cut(shard(self, model))) or model
    try:
        case = make_case() if name in SMALL else language_case().with_(task=Language(chunk=4))
        result = execute(plan, case, seed=3, device="cpu" if torch.cuda.is_available() else None, **more)
    finally:
        Distribution.shard = shard
    assert type(result.model) is type(case.model)
    assert all(p.requires_grad and not hasattr(p, "full_tensor") for p in result.model.parameters())
    if not follows():
        state = {k: v.contiguous().clone() for k, v in result.model.state_dict().items()}
        save_file(state, out / f"{mode}-{name}.safetensors")
    return {
        "history": result.trace.history,
        "ended": result.trace.ended,
        "sharded": all(seen),
        "processes": result.notes.get("processes"),
    }


def is_cut(model: torch.nn.Module) -> bool:
    return all(hasattr(p, "full_tensor") for p in model.parameters())


def resumed(out: Path, mode: str) -> dict:
    """Killed after the second checkpoint, then run again in the same folder; the first process's disk is slow."""
    saved, write = Checkpointer.save, checkpoint.write_atomic
    count: list[int] = []

    def slowly(*arguments):
        time.sleep(0.5)
        return write(*arguments)

    def save_and_die(self, phase):
        saved(self, phase)
        count.append(1)
        if len(count) == 2:
            raise Killed

    Checkpointer.save, checkpoint.write_atomic = save_and_die, slowly
    try:
        with RunDirectory(out / f"run-{mode}") as directory:
            one(out, mode, "resumed", PLANS["npo"], run=directory, identity="x", checkpoint_steps=1)
    except Killed:
        pass
    finally:
        Checkpointer.save, checkpoint.write_atomic = saved, write
    with RunDirectory(out / f"run-{mode}") as directory:
        return one(out, mode, "resumed", PLANS["npo"], run=directory, identity="x", checkpoint_steps=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
