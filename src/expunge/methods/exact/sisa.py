"""SISA: shards and slices, so that a deletion retrains only what has seen the row.

Paper: "Machine Unlearning", Bourtoule et al., IEEE S&P 2021, https://arxiv.org/abs/1912.03817.

    protect:  D = D_1 + ... + D_S (shards), D_s = D_s1 + ... + D_sR (slices);
              member s: for r = 1..R: go on from checkpoint r-1 on D_s1..D_sr, e_r epochs, save checkpoint r
    forget x in D_sr:  drop x; reload checkpoint r-1 of member s; repeat steps r..R
    predict:  mean of the members' probabilities

A checkpoint's key is a hash of the live rows up to its slice, so what is unaffected is found by its key and left
alone; any number of rows is one request. e_r = int(r a) - int((r-1) a), a = 2 e / (R + 1), as in the official code,
but at least 1. Departures: probabilities are averaged (the paper also offers a majority of one-hot votes, which has no
gradient and gives wrong classes a log-likelihood of minus infinity). Optimizer state starts anew in every slice;
schedules run within a slice.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import nn

from expunge.cases.case import Case
from expunge.cases.data import Split
from expunge.engine.workbench import Workbench
from expunge.methods.exact.ensemble import ShardedEnsemble, partition
from expunge.methods.exact.protected import protected_model
from expunge.methods.exact.retrain import compared
from expunge.methods.registry import method, setting
from expunge.parts.plan import Exact

Shards = Annotated[int, setting("disjoint parts of the data, one model each (chosen at protect)", ge=1)]
Slices = Annotated[int, setting("checkpoints per shard (chosen at protect)", ge=1)]
Likely = Annotated[str, setting("column, higher for rows more likely to be deleted (chosen at protect)")]


def train_sharded(case: Case, seed: int, shards: int, slices: int, likely: str, **_: Any) -> nn.Module:
    """What `expunge.protect(case, "sisa", shards=5, slices=3)` returns."""
    layout = partition(case.data, shards, slices, seed, likely)
    return ShardedEnsemble.trained(case, layout, torch.arange(len(case.data)), seed)


def retrain_affected(bench: Workbench) -> nn.Module:
    model = protected_model(bench, "sisa")
    for name, value in model.forget(bench.case, bench.splits["forget"].ids).items():
        bench.note(name, value)
    bench.note("shards", model.keys.shape[0])
    bench.note("slices", model.keys.shape[1])
    return model


def keys_match(bench: Workbench, model: Any) -> dict[str, Any]:
    """By construction: every checkpoint's key is the hash of live rows only."""
    stale = model.stale(model.rows.live.cpu().nonzero().squeeze(1))
    return {"kind": "unproved" if stale else "proved", "by": "keys", "stale": len(stale)}


def equals_scratch(bench: Workbench, model: Any) -> dict[str, Any]:
    """Byte equality with the ensemble trained from scratch on the live rows, same partition and seed."""
    live = Split("live", bench.case.data, model.rows.live.cpu().nonzero().squeeze(1))
    return {"by": "retraining", **compared(model, model.expunge_train(bench.case, live, model.seed))}


@method(
    family="exact", needs=("protection", "recipe"), kinds=("classification", "regression"), intention="removal",
    mechanism="sharded retraining", guarantee="exact", paper="Bourtoule et al., S&P 2021, 1912.03817",
    learn=train_sharded, rebuild=ShardedEnsemble.rebuilt,
)  # fmt: skip
def sisa(
    shards: Shards = 5,
    slices: Slices = 3,
    likely: Likely = "",
    prove: Annotated[
        bool, setting("retrain the ensemble from scratch and compare bytes (outside the measured time)")
    ] = False,
) -> Exact:
    """Retrain only the shards and slices that have seen the forget rows."""
    return Exact(
        retrain_affected, "retrain(slices r.. of shard s with the forget rows)", equals_scratch if prove else keys_match
    )
