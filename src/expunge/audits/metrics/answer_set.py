"""Answer sets: what a generative model draws when it is asked for every cell of a grid, each image from a seed of its own.

    cells = (Cell("a red three", {"style": "red", "object": "three"}), ...)
    answers = answer_set(model, cells, seeds=(0, 1, 2), sampling=Sampling(20, 3.0), cache=folder)
    answers.images                 # (cells x seeds, C, H, W) uint8, cell by cell

The seed of an image is made from the cell's words and the set's seed alone, so all models draw it from the same noise, and a
cell's images are the same whatever else is asked. Sets are kept by cell under a digest of all they depend on: weights and kind
of model, scheduler, sampling, the cell's words, seeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.audits.metrics.judges import to_uint8
from expunge.errors import BadSetting
from expunge.files import digest_bytes, digest_weights, write_atomic
from expunge.seeds import derive
from expunge.tasks.sampling import Sampling, sample


@dataclass(frozen=True)
class Cell:
    """One question. asks: a prompt, or a class id. shows: domain -> name of what a right answer shows.

    wording: 0 where it is asked in the words that methods are told of; others ask for the same in other words.
    """

    asks: str | int
    shows: Mapping[str, str]
    wording: int = 0

    def holds(self, target: Mapping[str, str]) -> bool:
        """Whether a right answer would show the target (all of its domains)."""
        return all(self.shows.get(domain) == name for domain, name in target.items())

    @property
    def name(self) -> str:
        return ",".join(f"{domain}={name}" for domain, name in self.shows.items())


@dataclass(frozen=True)
class AnswerSet:
    """images (N, C, H, W) uint8, cell by cell and seed by seed; cell (N,) indexes cells; seed (N,) of the set; finite (N,) bool:
    False where the model drew NaN (these images are black, and are counted out)."""

    cells: tuple[Cell, ...]
    images: Tensor
    cell: Tensor
    seed: Tensor
    finite: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def dropped(self) -> int:
        return int((~self.finite).sum())

    def names(self) -> list[str]:
        """A file name for each image; `decoded` reads it."""
        return [
            f"{self.cells[c].name},wording={self.cells[c].wording},seed={s}.png"
            for c, s in zip(self.cell.tolist(), self.seed.tolist(), strict=True)
        ]

    def finite_only(self) -> AnswerSet:
        keep = self.finite
        return AnswerSet(self.cells, self.images[keep], self.cell[keep], self.seed[keep], self.finite[keep])


def decoded(name: str) -> dict[str, str]:
    """domain -> name, and wording and seed, of an image's file name."""
    return dict(re.findall(r"([^=,]+)=([^,]*?)(?=,[^=,]+=|\.png$)", name))


def image_seed(cell: Cell, seed: int) -> int:
    """The seed of a cell's image: the same for every model."""
    return derive(seed, "answer", str(cell.asks))


def answer_set(
    model: Any,
    cells: Sequence[Cell],
    seeds: Sequence[int] = (0, 1, 2),
    sampling: Sampling | None = None,
    cache: str | Path | None = None,
    batch_size: int = 128,
) -> AnswerSet:
    """Every cell under every seed. cache: a folder where a cell's images are kept; cells that are not there are drawn together."""
    if len(set(seeds)) != len(seeds) or not seeds:
        raise BadSetting(f"expected at least one seed, and each once, found {list(seeds)}; correct them")
    sampling = sampling or Sampling()
    of_model = _digest(model, sampling) if cache is not None else ""
    files = [None if cache is None else Path(cache) / f"{_key(of_model, cell, seeds)}.safetensors" for cell in cells]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for number, file in enumerate(files):
        if file is not None and file.is_file():
            found[number] = _read(file)
    left = [number for number in range(len(cells)) if number not in found]
    if left:
        asked = model.conditions.of([cells[number].asks for number in left])
        own = [image_seed(cells[number], seed) for number in left for seed in seeds]
        drawn = sample(model, asked.repeat_interleave(len(seeds), 0), sampling, own, batch_size)
        for place, number in enumerate(left):
            rows = slice(place * len(seeds), (place + 1) * len(seeds))
            found[number] = to_uint8(drawn.images[rows]), drawn.finite[rows]
            file = files[number]
            if file is not None:
                _write(file, *found[number])
    return AnswerSet(
        tuple(cells),
        torch.cat([found[n][0] for n in range(len(cells))]),
        torch.arange(len(cells)).repeat_interleave(len(seeds)),
        torch.tensor(list(seeds)).repeat(len(cells)),
        torch.cat([found[n][1] for n in range(len(cells))]),
    )


def answer_key(model: Any, cell: Cell, seeds: Sequence[int], sampling: Sampling) -> str:
    """The digest under which a cell's images are kept: another weight, seed, scheduler, step count or guidance, another key."""
    return _key(_digest(model, sampling), cell, seeds)


def _digest(model: Any, sampling: Sampling) -> str:
    """Of all that a model's images depend on beside the question; a guard tells what it is by `about`."""
    scheduler, about = getattr(model, "scheduler", None), getattr(model, "about", dict)
    facts = {
        "weights": digest_weights(model.state_dict()),
        "kind": type(model).__qualname__,
        "about": about(),
        "scheduler": [type(scheduler).__name__, dict(getattr(scheduler, "config", {}))],
        "sampling": sampling.describe(),
        "dtype": str(getattr(model, "dtype", "")),
    }
    return digest_bytes(json.dumps(facts, sort_keys=True, default=str))


def _key(of_model: str, cell: Cell, seeds: Sequence[int]) -> str:
    return digest_bytes(json.dumps([of_model, cell.asks, list(seeds)]))


def _read(file: Path) -> tuple[Tensor, Tensor]:
    from safetensors.torch import load_file

    kept = load_file(file)
    return kept["images"], kept["finite"].bool()


def _write(file: Path, images: Tensor, finite: Tensor) -> None:
    from safetensors.torch import save

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save({"images": images.contiguous(), "finite": finite.to(torch.uint8)}))
