"""Training by shards and slices with a checkpoint after every slice: the model behind SISA (see `sisa.py`)."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.cases.case import Case
from expunge.cases.data import Data, Split
from expunge.engine.execute import fit
from expunge.errors import BadData, BadSetting, UnmetNeed
from expunge.methods.exact.protected import LiveRows
from expunge.seeds import derive, generator
from expunge.tasks.classification import call_model


@dataclass(frozen=True)
class Partition:
    """Where each row of the table belongs: shard (N,) and slice (N,) int64, of `shards` and `slices`."""

    shard: Tensor
    slice: Tensor
    shards: int
    slices: int


def partition(data: Data, shards: int, slices: int, seed: int, likely: str = "") -> Partition:
    """Equal shards of equal slices in an order drawn from the seed. likely: a column of numbers, higher for rows more
    likely to be deleted; those are put together into the last shards and, there, the last slices, where a deletion
    costs least."""
    rows = len(data)
    if shards * slices > rows:
        raise BadSetting(
            f"expected at most one slice per row, found {shards} shards of {slices} slices for {rows} rows; use fewer"
        )
    order = torch.randperm(rows, generator=generator(seed, "sisa", "partition"))
    if likely:
        values = data.column(likely)
        if not isinstance(values, Tensor) or values.dim() != 1:
            raise BadData(f"expected one number per row in the column '{likely}', found another kind; give numbers")
        order = order[values[order].double().argsort(stable=True)]
    shard, part = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    for s, of_shard in enumerate(order.tensor_split(shards)):
        for r, of_slice in enumerate(of_shard.tensor_split(slices)):
            shard[of_slice], part[of_slice] = s, r
    return Partition(shard, part, shards, slices)


def slice_epochs(epochs: int, slices: int) -> list[int]:
    """Epochs at each step r over the slices 0..r, so that the whole costs about `epochs` over all slices:
    int((r+1) a) - int(r a), a = 2 epochs / (slices + 1), and at least 1, or a slice would never be learned."""
    a = 2 * epochs / (slices + 1)
    return [max(int((r + 1) * a) - int(r * a), 1) for r in range(slices)]


class Snapshot(nn.Module):
    """A state dict held as buffers, which are saved and copied with the model but are no weights of it."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        for name, value in state.items():
            self.register_buffer(name.replace(".", "/"), value.detach().clone())

    def state(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): value for name, value in self.named_buffers()}

    def store(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(state[name])


class ShardedEnsemble(nn.Module):
    """One model per shard; their mean is the prediction.

    Returns (B, K) log of the mean probability for classes, the mean of the predictions for values.

    State: members; snapshots[s][r], member s before slice r (r = 0: untrained); keys (S, R, 32) uint8, what snapshot r
    + 1 was trained on; shard, slice (N,); rows (`LiveRows`).
    """

    expunge_protection = "sisa"

    def __init__(self, members: list[nn.Module], layout: Partition, rows: LiveRows, seed: int, classes: bool):
        super().__init__()
        self.seed, self.classes = seed, classes
        self.members = nn.ModuleList(members)
        self.snapshots = nn.ModuleList(
            nn.ModuleList(Snapshot(member.state_dict()) for _ in range(layout.slices + 1)) for member in members
        )
        self.register_buffer("keys", torch.zeros(layout.shards, layout.slices, 32, dtype=torch.uint8))
        self.register_buffer("shard", layout.shard.clone())
        self.register_buffer("slice", layout.slice.clone())
        self.rows = rows

    @classmethod
    def trained(
        cls, case: Case, layout: Partition, ids: Tensor, seed: int, build: nn.Module | None = None
    ) -> ShardedEnsemble:
        """Fresh members (of the case, or like `build`), trained on the rows `ids`."""
        source = case if build is None else case.with_(model=build)
        fresh = [source.fresh(derive(seed, "sisa", "fresh", s)) for s in range(layout.shards)]
        model = cls(fresh, layout, LiveRows.of(case.data, ids), seed, case.task.name == "classification")
        model.train_stale(case, ids)
        return model

    def expunge_structure(self) -> dict[str, Any]:
        shards, slices = self.keys.shape[:2]
        return {
            "rows": len(self.shard), "shards": shards, "slices": slices, "seed": self.seed, "classes": self.classes
        }  # fmt: skip

    @classmethod
    def rebuilt(cls, base: nn.Module, rows: int, shards: int, slices: int, seed: int, classes: bool) -> ShardedEnsemble:
        nowhere = torch.zeros(rows, dtype=torch.int64)
        members = [copy.deepcopy(base) for _ in range(shards)]
        return cls(members, Partition(nowhere, nowhere, shards, slices), LiveRows(rows), seed, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = torch.stack([call_model(member, inputs) for member in self.members])
        return outputs.log_softmax(-1).logsumexp(0) - math.log(len(self.members)) if self.classes else outputs.mean(0)

    @property
    def partition(self) -> Partition:
        return Partition(self.shard.cpu(), self.slice.cpu(), self.keys.shape[0], self.keys.shape[1])

    # -- training --------------------------------------------------------------------------------------------------
    def key(self, s: int, r: int, ids: Tensor) -> Tensor:
        """(32,) hash of the live rows of shard s up to slice r."""
        live = ids[(self.shard.cpu()[ids] == s) & (self.slice.cpu()[ids] <= r)]
        text = f"{self.seed}/{s}/{r}:" + ",".join(map(str, live.tolist()))
        return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)

    def stale(self, ids: Tensor) -> list[tuple[int, int]]:
        """(shard, slice) pairs whose snapshot was trained on other rows than those now live."""
        keys = self.keys.cpu()
        shards, slices = keys.shape[:2]
        return [
            (s, r) for s in range(shards) for r in range(slices) if not torch.equal(self.key(s, r, ids), keys[s, r])
        ]

    def train_stale(self, case: Case, ids: Tensor) -> dict[str, Any]:
        """Train what is not up to date with the live rows `ids` (sorted); returns what it took."""
        if case.recipe is None:
            raise UnmetNeed("expected the training recipe, found none; pass Case(recipe=Training(...))")
        epochs = slice_epochs(case.recipe.epochs, self.keys.shape[1])
        shard, part, augment = self.shard.cpu(), self.slice.cpu(), case.split("train").augment
        done = whole = 0
        pending = set(self.stale(ids))
        for s, member in enumerate(self.members):
            for r, passes in enumerate(epochs):
                live = ids[(shard[ids] == s) & (part[ids] <= r)]
                whole += passes * len(live)
                if (s, r) not in pending:
                    continue
                member.load_state_dict(self.snapshots[s][r].state())
                if len(live):
                    fit(case, Split("shard", case.data, live, augment), derive(self.seed, "sisa", s, r), model=member,
                        recipe=replace(case.recipe, epochs=passes))  # fmt: skip
                self.snapshots[s][r + 1].store(member.state_dict())
                self.keys[s, r] = self.key(s, r, ids).to(self.keys.device)
                done += passes * len(live)
            member.load_state_dict(self.snapshots[s][-1].state())
        return {
            "shards_retrained": sorted({s for s, _ in pending}),
            "slices_retrained": len(pending),
            "share_of_training": done / max(whole, 1),
        }

    def forget(self, case: Case, ids: Tensor) -> dict[str, Any]:
        """Retrain the slices that held these rows and those after them; all else is as it was, bit for bit."""
        return self.train_stale(case, self.rows.remove(case.data, ids))

    def expunge_train(self, case: Case, rows: Split, seed: int) -> ShardedEnsemble:
        """The ensemble trained from scratch on these rows with the same partition."""
        return ShardedEnsemble.trained(case, self.partition, rows.ids, seed, self.members[0]).to(self.keys.device)
