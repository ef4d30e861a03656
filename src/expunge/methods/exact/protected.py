"""What models trained by `expunge.protect` share: the rows they hold, by digest, and a frozen feature extractor."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.cases.data import Data
from expunge.errors import BadData, BadModel, BadRequest, UnmetNeed
from expunge.tasks.base import evaluating, move_to_model
from expunge.tasks.classification import call_model

if TYPE_CHECKING:
    from expunge.cases.case import Case
    from expunge.engine.workbench import Workbench


def protected_model(bench: Workbench, name: str) -> Any:
    """The working copy, which must have been trained by `expunge.protect(case, name)`."""
    found = getattr(bench.model, "expunge_protection", "")
    if found != name:
        raise UnmetNeed(
            f"expected a model trained by expunge.protect(case, '{name}'), found "
            + (f"one trained for '{found}'; call unlearn(case, '{found}')" if found else "an ordinary one; train it so")
        )
    return bench.model


class LiveRows(nn.Module):
    """Which rows of the training table a model still holds.

    Rows keep their numbers. Live rows are checked by digest; forgotten ones are never read again, so the table may have
    them blanked (but not dropped, which would renumber the others).

    State: digests (N, 32) uint8, zero where not live; live (N,) bool.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.register_buffer("digests", torch.zeros(rows, 32, dtype=torch.uint8))
        self.register_buffer("live", torch.zeros(rows, dtype=torch.bool))

    @classmethod
    def of(cls, data: Data, ids: Tensor) -> LiveRows:
        """The rows `ids` of the table."""
        rows = cls(len(data))
        rows.digests[ids], rows.live[ids] = _digests(data, ids), True
        return rows

    def check(self, data: Data, ids: Tensor) -> None:
        """Raise `BadData` unless these rows of the table are those that were learned."""
        if len(data) != len(self.live):
            raise BadData(
                f"expected the table of {len(self.live)} rows that the model was trained on, found {len(data)} rows; "
                "keep row "
                "numbers as they were (forgotten rows may be blanked, not dropped)"
            )
        other = (_digests(data, ids) != self.digests.cpu()[ids]).any(1)
        if bool(other.any()):
            raise BadData(
                f"expected the rows that the model was trained on, found {int(other.sum())} with other content (first: "
                f"{ids[other][:5].tolist()}); use the very training table"
            )

    def remove(self, data: Data, ids: Tensor) -> Tensor:
        """Mark rows as forgotten; returns the live ones (N',), checked. Nothing changes if the request is refused."""
        gone = ids[~self.live.cpu()[ids]]
        if len(gone):
            raise BadRequest(
                f"expected rows that the model holds, found {len(gone)} that were never learned or are already "
                "forgotten "
                f"(first: {gone[:5].tolist()}); leave them out of the request"
            )
        live = self.live.cpu().clone()
        live[ids] = False
        left = live.nonzero().squeeze(1)
        self.check(data, left)
        self.live = live.to(self.live.device)
        self.digests[ids.to(self.digests.device)] = 0
        return left


def _digests(data: Data, ids: Tensor) -> Tensor:
    rows = data.row_digests(ids)
    return torch.tensor([list(bytes.fromhex(row)) for row in rows], dtype=torch.uint8).reshape(-1, 32)


class Trunk(nn.Module):
    """A frozen copy of a model without its last linear layer: inputs -> (B, p) features."""

    def __init__(self, model: nn.Module, outputs: int):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        linear = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        if not linear or self.model.get_submodule(linear[-1]).out_features != outputs:
            raise BadModel(
                f"expected the model to end in a linear layer with {outputs} outputs, found "
                f"{'another one last' if linear else 'no linear layer'}; use backbone='inputs', or give a model that "
                "does"
            )
        parent, _, name = linear[-1].rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.Identity())

    def forward(self, inputs: Tensor) -> Tensor:
        return call_model(self.model, inputs).flatten(1)


def outputs(case: Case) -> int:
    """How many numbers the case's model says about one row (classes, or values)."""
    with evaluating(case.model):
        row = move_to_model(case.data.fetch(torch.zeros(1, dtype=torch.int64)), case.model)
        return case.task.forward(case.model, row).prediction.reshape(1, -1).shape[1]


def width_of(case: Case, trunk: nn.Module | None, device: torch.device) -> int:
    """How many features the trunk (or none: the inputs themselves) gives for one row."""
    inputs, _ = next(rows_of(case, torch.zeros(1, dtype=torch.int64), device))
    with torch.no_grad():
        return (inputs if trunk is None else trunk(inputs)).flatten(1).shape[1]


def rows_of(case: Case, ids: Tensor, device: torch.device, batch_size: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, labels) of the rows `ids`, in blocks on the device."""
    for part in ids.split(batch_size):
        batch = case.data.fetch(part).to(device)
        yield batch[case.task.input], batch[getattr(case.task, "labels", "labels")]
