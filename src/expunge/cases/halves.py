"""A case cut into two: one half to choose settings with, the other to tell what the choice is worth."""

from __future__ import annotations

import copy

import torch

from expunge.cases.case import Case
from expunge.cases.data import Split
from expunge.errors import BadData
from expunge.seeds import generator


def halves(case: Case) -> tuple[Case, Case]:
    """The same model and request on half of the rows of every split each: (for selection, kept back).

    Drawn by the case's own seed, so it is fixed before anything is run or measured, and the same for every method. Row numbers stay;
    no row is in both. Raises `BadData` where a split has fewer than two rows.
    """
    parts: tuple[dict[str, Split], dict[str, Split]] = {}, {}
    for name, split in case.splits.items():
        if name == "train":
            continue
        if len(split) < 2:
            raise BadData(
                f"expected at least two rows in '{name}' to cut it into halves, found {len(split)}; choose settings on another "
                "case (another request on the same model)"
            )
        order = torch.randperm(len(split), generator=generator(case.seed, "case", "selection", name))
        middle = (len(order) + 1) // 2
        for part, positions in zip(parts, (order[:middle], order[middle:]), strict=True):
            part[name] = split.subset(positions.sort().values)
    found = []
    for label, part in zip(("selection", "kept back"), parts, strict=True):
        ids = torch.cat([part["forget"].ids, part["retain"].ids]).sort().values
        half = copy.copy(case)
        half.name, half.notes = f"{case.name}, {label}", {**case.notes, "half": label}
        half.__dict__["splits"] = {**part, "train": Split("train", case.data, ids, case.augment)}
        found.append(half)
    return found[0], found[1]
