"""Direction ablation: take out of every activation the one direction in which unlearning moved it.

    d_l = mean h_l(unlearned; forget tokens) - mean h_l(original; the same tokens)       or minus the mean over retain
          tokens, or the first principal component of the tokens' differences
    h_l <- h_l - (h_l . d/|d|) d/|d|                                                     on chosen blocks

Tokens whose L1 distance from the mean is an outlier (z > 3) are left out, and so are the first `skip` of each row: the
first token of a transformer is a sink whose activation is large and says nothing. The attacker tries all blocks together
and each block alone, and keeps what brings back most. Steering methods (RMU) add such a direction, and lose it so.

(Arditi et al., arXiv 2406.11717; Lucki et al., arXiv 2409.18025; language attacks card, 3.)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audits.attacks.activations import decoder, find_decoder, streams
from expunge.audits.attacks.budget import Attack, Budget, attack_check, forget_scores
from expunge.errors import BadSetting
from expunge.seeds import generator

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case
    from expunge.cases.data import Split

SOURCES = ("difference", "benign", "principal")
OUTLIER = 3.0


@dataclass(frozen=True)
class DirectionAblation(Attack):
    """source: of the direction: `difference` to the original on the same tokens, to `benign` tokens of the same model, or
    the first `principal` component of the differences to the original. blocks: numbers from 0; None tries all and each."""

    source: Literal["difference", "benign", "principal"] = "difference"
    blocks: tuple[int, ...] | None = None
    skip: int = 1

    def __post_init__(self) -> None:
        if self.source not in SOURCES or self.skip < 0:
            raise BadSetting(
                f"expected a source among {', '.join(SOURCES)} and skip >= 0, found {self.source!r} and {self.skip}; correct them"
            )

    @property
    def name(self) -> str:
        return "direction_ablation" if self.source == "difference" else f"direction_ablation_{self.source}"

    def skipped(self, subjects: Subjects) -> str | None:
        if subjects.task.name != "language":
            return f"expected a language model, found {subjects.task.name}"
        names = ("original", *subjects.compared)
        lacking = [name for name in names if find_decoder(subjects.model(name)) is None]
        if lacking:
            return f"expected blocks to read and change, found none in {', '.join(dict.fromkeys(lacking))}"
        if len(decoder(subjects.model("unlearned")).blocks) != len(decoder(subjects.case.model).blocks):
            return "expected as many blocks as the original has, found another number"
        if self.source == "benign":
            return subjects.unmet("retain")
        return None

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        """The copy in which the most came back; the model's own copy where no direction brought anything."""
        found = directions(model, case, budget, seed, self.source, self.skip)
        count = len(found)
        tried = [tuple(range(count)), *((i,) for i in range(count))] if self.blocks is None else [self.blocks]
        forget = case.split("forget")
        best = copy.deepcopy(model)
        score = float(forget_scores(best, case, forget, seed, 64).mean())
        for blocks in tried:
            ablated = without(model, {i: found[i] for i in blocks})
            now = float(forget_scores(ablated, case, forget, seed, 64).mean())
            if now > score:
                best, score = ablated, now
        return best

    def scores(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> np.ndarray:
        return forget_scores(self.run(model, case, budget, seed), case, case.split("forget"), seed, 64)

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        n, parts = len(case.split("forget")), find_decoder(case.model)
        tried = 1 if self.blocks is not None or parts is None else len(parts.blocks) + 1
        return {"steps": 0, "examples": n, "queries": (2 + tried) * n}


def directions(
    model: nn.Module, case: Case, budget: Budget, seed: int, source: str = "difference", skip: int = 1
) -> list[Tensor]:
    """The unit direction (d,) of each block; zeros where the two means agree."""
    forget = case.split("forget")
    own = _tokens(model, case, forget, seed, skip)
    if source == "benign":
        retain = case.split("retain")
        retain = retain.sample(min(len(retain), budget.queries), generator(seed, "benign rows"))
        other = _tokens(model, case, retain, seed, skip)
    else:
        other = _tokens(case.model, case, forget, seed, skip)
    found = []
    for a, b in zip(own, other, strict=True):
        if source == "benign":
            way = a[~outliers(a)].mean(0) - b[~outliers(b)].mean(0)
        else:
            change = a - b
            change = change[~outliers(change)]
            way = change.mean(0)
            if source == "principal":
                values = torch.linalg.svd(change - way, full_matrices=False).Vh[0]
                way = values if float(change.norm()) > 0 else way
        length = way.norm()
        found.append(way / length if float(length) > 0 else torch.zeros_like(way))
    return found


def outliers(tokens: Tensor) -> Tensor:
    """(N,) bool of (N, d): True where a token's L1 distance from the mean is more than 3 deviations above the usual."""
    distance = (tokens - tokens.mean(0)).abs().sum(1)
    spread = distance.std()
    return (distance - distance.mean()) > OUTLIER * spread if len(tokens) > 1 else torch.zeros(1, dtype=torch.bool)


def without(model: nn.Module, ways: Mapping[int, Tensor]) -> nn.Module:
    """A copy whose blocks' outputs have no part along their unit direction (d,)."""
    model = copy.deepcopy(model)
    blocks = decoder(model).blocks
    for number, way in ways.items():
        blocks[number].register_forward_hook(_ablate(way))
    return model


def _ablate(way: Tensor) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        h = output if isinstance(output, Tensor) else output[0]
        d = way.to(h)
        h = h - (h @ d)[..., None] * d
        return h if isinstance(output, Tensor) else (h, *output[1:])

    return hook


def _tokens(model: nn.Module, case: Case, split: Split, seed: int, skip: int) -> list[Tensor]:
    """(N, d) double of each block: all real tokens of the split but the first `skip` of each row."""
    found: list[list[Tensor]] = []
    for batch, stream in streams(model, case.task, split, seed):
        real = batch["attention_mask"].bool()
        real = real & (real.cumsum(1) > skip)
        found.append([h[real].double() for h in stream[1:]])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


direction_ablation = attack_check(
    DirectionAblation(),
    "What taking the direction between unlearned and original activations out of the blocks brings back.",
    kinds=("language",),
    source="arXiv 2409.18025; language attacks card, 3",
)
