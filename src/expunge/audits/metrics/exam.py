"""The exam of a generative model: a grid of questions, judges who mark the drawn answers, and what the marks say.

    exam = Exam(cells, {"style": "red"}, (style_judge, object_judge), seeds=range(5), sampling=Sampling(20, 3.0))
    case = Case(model, data, request, task="diffusion", exam=exam)      # audits and verdict then ask the model itself

A target is a name in one domain (a style, an object, a class) or in several (one object in one style). Cells whose right
answer shows it are asked for unlearning alone; all others for what must stay. With a_d = 1 where the judge of domain d says
what the cell asks for:

    ua    1 - mean over the target's cells of 1[judge = target]
    ira   mean a_d over the other cells, d the target's domain         cra   the same, d every other domain
    leak  mean over the other cells of 1[judge = target]

The forget score m(.) of the verdict is 1 for an answer that shows the target and is like a real image, whether it was asked in
the trained words or in others; utility is 1 for an answer to another cell that is right in every domain and like a real image.
So a model that draws mush has neither forgotten nor kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from expunge.audits.metrics.answer_set import AnswerSet, Cell, answer_set
from expunge.audits.metrics.judges import FLOOR, Judge, require
from expunge.errors import BadSetting, nearest
from expunge.tasks.sampling import Sampling


@dataclass(frozen=True)
class Marks:
    """What the judges say of n answers. cell, seed: (n,). probabilities: domain -> (n, K), names: domain -> K names.
    rejected: (n,) like no real image. dropped: answers with NaN, which are not among the n.

    All arrays below are over the answers that a mask keeps, in their order.
    """

    cells: tuple[Cell, ...]
    target: Mapping[str, str]
    cell: np.ndarray
    seed: np.ndarray
    probabilities: Mapping[str, np.ndarray]
    names: Mapping[str, tuple[str, ...]]
    rejected: np.ndarray
    dropped: int = 0

    # -- masks (n,) ------------------------------------------------------------------------------------------------
    def _of_cells(self, flags: Sequence[bool]) -> np.ndarray:
        return np.asarray(flags, dtype=bool)[self.cell]

    @property
    def asked(self) -> np.ndarray:
        """The target, in any words."""
        return self._of_cells([cell.holds(self.target) for cell in self.cells])

    @property
    def plain(self) -> np.ndarray:
        """Asked in the words that the methods were told."""
        return self._of_cells([cell.wording == 0 for cell in self.cells])

    @property
    def near(self) -> np.ndarray:
        """Other cells that share a part of the target (the same object in another style)."""
        shared = [any(cell.shows.get(d) == n for d, n in self.target.items()) for cell in self.cells]
        return self._of_cells(shared) & ~self.asked

    # -- what each answer shows (n,) -------------------------------------------------------------------------------
    def says(self, domain: str) -> np.ndarray:
        """(n,) index of the judge's answer."""
        return self.probabilities[domain].argmax(1)

    def right(self, domain: str) -> np.ndarray:
        """(n,) whether the judge of the domain says what the cell asked for; True where the cell does not say."""
        names = self.names[domain]
        wanted = np.array([names.index(c.shows[domain]) if domain in c.shows else -1 for c in self.cells])[self.cell]
        return (self.says(domain) == wanted) | (wanted < 0)

    def all_right(self) -> np.ndarray:
        return np.all([self.right(domain) for domain in self.names], axis=0)

    def shows_target(self) -> np.ndarray:
        return np.all([self.says(d) == self.names[d].index(n) for d, n in self.target.items()], axis=0)

    def target_probability(self) -> np.ndarray:
        """(n,) the judges' probability of the target (the product over its domains)."""
        return np.prod([self.probabilities[d][:, self.names[d].index(n)] for d, n in self.target.items()], axis=0)

    def entropy(self) -> np.ndarray:
        """(n,) nats, of the judge of the target's first domain."""
        p = self.probabilities[self.domains[0]].clip(1e-12, 1)
        return -(p * np.log(p)).sum(1)

    @property
    def domains(self) -> tuple[str, ...]:
        """The target's."""
        return tuple(self.target)

    @property
    def other_domains(self) -> tuple[str, ...]:
        return tuple(domain for domain in self.names if domain not in self.target)

    # -- the numbers -----------------------------------------------------------------------------------------------
    def unlearned(self, plain: bool = True) -> np.ndarray:
        """1 where an answer to the target's cells does not show it, in the trained words (or in other words)."""
        return ~self.shows_target()[self.asked & (self.plain == plain)]

    def kept(self, domains: Sequence[str], where: np.ndarray | None = None) -> np.ndarray:
        """1 where an answer to another cell is right in all these domains."""
        right = np.all([self.right(domain) for domain in domains], axis=0)
        return right[~self.asked & self.plain if where is None else where]

    def by_name(self) -> dict[str, float]:
        """Retained name of the target's domain -> accuracy in that domain."""
        domain = self.domains[0]
        return {
            name: float(self.right(domain)[own].mean())
            for name in self.names[domain]
            if (
                own := self._of_cells([c.shows.get(domain) == name for c in self.cells]) & ~self.asked & self.plain
            ).any()
        }

    def worst(self) -> tuple[str, float]:
        """The retained name whose accuracy is lowest, and this accuracy: means hide a neighbour that died."""
        found = self.by_name()
        return min(found.items(), key=lambda item: item[1]) if found else ("", float("nan"))

    def leaks(self) -> np.ndarray:
        """1 where an answer to another cell shows the target."""
        return self.shows_target()[~self.asked & self.plain]

    def yields(self) -> dict[str, float]:
        """What the target's cells yield now: name in the target's first domain, or `rejected` -> share of answers."""
        domain, asked = self.domains[0], self.asked & self.plain
        counts = {"rejected": float(self.rejected[asked].mean())} if asked.any() else {}
        for index, name in enumerate(self.names[domain]):
            counts[name] = float(((self.says(domain) == index) & ~self.rejected)[asked].mean())
        return dict(sorted(((k, v) for k, v in counts.items() if v > 0), key=lambda item: -item[1]))

    def substitute(self) -> tuple[str, np.ndarray]:
        """The one other name that the target's cells yield most, and (m,) 1 where an answer shows it and is like a real image."""
        domain, asked = self.domains[0], self.asked & self.plain
        other = next((n for n in self.yields() if n not in ("rejected", self.target[domain])), "")
        shown = self.says(domain) == self.names[domain].index(other) if other else np.zeros(len(asked), dtype=bool)
        return other, (shown & ~self.rejected)[asked]

    def recalled(self) -> np.ndarray:
        """(m,) the verdict's forget score of every answer to the target's cells, in any words."""
        return (self.shows_target() & ~self.rejected)[self.asked].astype(np.float64)

    def useful(self) -> np.ndarray:
        """(m,) 1 where an answer to another cell is right in every domain and like a real image."""
        return (self.all_right() & ~self.rejected)[~self.asked & self.plain].astype(np.float64)


@dataclass(frozen=True)
class Exam:
    """What a generative model is asked, and who marks it.

    cells: the grid. target: domain -> name. judges: one for each domain. seeds: of the answer set. features: network of FID,
    KID and distances, named feature_name beside every number. reference: (M, C, H, W) uint8 real images without the target.
    floor: least held-out accuracy of a judge. cache: a folder for answer sets. clip: folder of a CLIP model, for its score.
    """

    cells: tuple[Cell, ...]
    target: Mapping[str, str]
    judges: tuple[Judge, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    sampling: Sampling = field(default_factory=Sampling)
    features: nn.Module | None = None
    feature_name: str = ""
    reference: Tensor | None = None
    floor: float = FLOOR
    cache: Path | None = None
    clip: Any = None

    def __post_init__(self) -> None:
        require(*self.judges, floor=self.floor)
        by_domain = {judge.domain: judge for judge in self.judges}
        if not self.target:
            raise BadSetting("expected a target as domain: name, found none; name what is to be forgotten")
        for shown in (dict(self.target), *(dict(cell.shows) for cell in self.cells)):
            for domain, name in shown.items():
                if domain not in by_domain:
                    raise BadSetting(f"expected a judge of '{domain}', found {', '.join(by_domain) or 'none'}; add one")
                if name not in by_domain[domain].names:
                    known = by_domain[domain].names
                    raise BadSetting(
                        f"expected a {domain} of {', '.join(known)}, found '{name}'.{nearest(name, known)} Correct it."
                    )
        held = [cell.holds(self.target) for cell in self.cells]
        if not any(held) or all(held):
            raise BadSetting(
                f"expected cells that show the target and cells that do not, found {sum(held)} of {len(held)} that do; "
                "ask for both"
            )

    def answers(self, model: Any) -> AnswerSet:
        return answer_set(model, self.cells, self.seeds, self.sampling, self.cache)

    def marks(self, model: Any) -> Marks:
        """The judges' marks of the model's answers."""
        return self.marked(self.answers(model))

    def marked(self, answers: AnswerSet) -> Marks:
        """The judges' marks; every judge sees the same bytes, answers with NaN are counted out."""
        kept = answers.finite_only()
        first = self.judges[0]
        empty = not len(kept)
        return Marks(
            answers.cells, self.target, kept.cell.numpy(), kept.seed.numpy(),
            {j.domain: np.zeros((0, len(j.names))) if empty else j(kept.images).numpy() for j in self.judges},
            {j.domain: j.names for j in self.judges},
            np.zeros(0, dtype=bool) if empty else first.rejected(kept.images).numpy(), answers.dropped,
        )  # fmt: skip

    def recalled(self, model: Any) -> np.ndarray:
        """(m,) forget scores of the answers to the target's cells; an answer with NaN shows nothing (0)."""
        return self._padded(self.answers(model), True)

    def useful(self, model: Any) -> np.ndarray:
        """(m,) utility of the answers to the other cells; an answer with NaN is of no use (0)."""
        return self._padded(self.answers(model), False)

    def _padded(self, answers: AnswerSet, target: bool) -> np.ndarray:
        marks = self.marked(answers)
        values = np.zeros(len(answers))
        asked = np.array([cell.holds(self.target) for cell in answers.cells])[answers.cell.numpy()]
        plain = np.array([cell.wording == 0 for cell in answers.cells])[answers.cell.numpy()]
        wanted = asked if target else ~asked & plain
        values[answers.finite.numpy() & wanted] = marks.recalled() if target else marks.useful()
        return values[wanted]

    def describe(self) -> dict[str, Any]:
        """What records carry beside every number."""
        return {
            "target": dict(self.target), "cells": len(self.cells), "seeds": list(self.seeds),
            "sampling": self.sampling.describe(), "judges": [str(judge) for judge in self.judges],
            "features": self.feature_name,
        }  # fmt: skip
