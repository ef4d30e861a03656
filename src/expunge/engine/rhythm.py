"""Which rows make which update: the rhythm of a plan, as a function of (seed, epoch) and nothing else.

`in_turn` passes each split in full, one after the other; `mixed` shuffles all splits together; `together` draws one batch of
each split per update, for one pass of the `epoch_of` split (default: the longest), shorter splits going round reshuffled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from expunge.cases.data import Split
from expunge.errors import BadSetting
from expunge.parts.plan import Plan
from expunge.parts.players import players_of
from expunge.seeds import generator

Update = dict[str, Tensor]
"""Split name -> row numbers (B,) of one update."""


def updates_of(
    plan: Plan, splits: Mapping[str, Split], active: Sequence[str], seed: int, epoch: int, pairs: bool = False
) -> list[Update]:
    """The rows of every update of an epoch. active: splits whose terms have a weight, in the order of the terms. pairs: no
    batch of a single row (batch norm cannot train on one): a last batch of one joins the batch before it."""
    names = [n for n in active if len(splits[n])]

    def whole(batches: list[Tensor]) -> list[Tensor]:
        return without_single_rows(batches) if pairs else batches

    def order(name: str, lap: int = 0) -> list[Tensor]:
        return whole(splits[name].order(generator(seed, "order", epoch, name, lap), batch_size(plan, name)))

    if not names:
        return []
    if plan.rhythm == "in_turn":
        return [{name: ids} for name in names for ids in order(name)]
    if plan.rhythm == "mixed":
        tags = torch.cat([torch.full((len(splits[n]),), k) for k, n in enumerate(names)])
        rows = torch.cat([splits[n].ids for n in names])
        shuffled = torch.randperm(len(rows), generator=generator(seed, "order", epoch, "mixed"))
        return [
            {n: rows[part][tags[part] == k] for k, n in enumerate(names) if bool((tags[part] == k).any())}
            for part in whole(list(shuffled.split(plan.batch_size)))
        ]
    laps = {name: order(name) for name in names}
    main = plan.epoch_of if plan.epoch_of in laps else max(laps, key=lambda n: len(laps[n]))
    length = len(laps[main])
    for name in names:
        lap = 0
        while len(laps[name]) < length:
            lap += 1
            laps[name] = laps[name] + order(name, lap)
    return [{name: laps[name][i] for name in names} for i in range(length)]


def batch_size(plan: Plan, split: str) -> int:
    """Rows per update of a split: a term's own size, else the plan's."""
    terms = (*plan.terms, *(term for p in players_of(plan) for term in p.terms))
    own = [t.batch_size for t in terms if t.on == split and t.batch_size is not None]
    return own[0] if own else plan.batch_size


def without_single_rows(batches: list[Tensor]) -> list[Tensor]:
    """A last batch of one row joins the batch before it; a split of one row is an error."""
    if not batches or len(batches[-1]) != 1:
        return batches
    if len(batches) == 1:
        raise BadSetting(
            "expected at least two rows per batch to train batch norm, found a split of one row; "
            "use Plan(mode='eval'), which keeps the running statistics"
        )
    return [*batches[:-2], torch.cat(batches[-2:])]
