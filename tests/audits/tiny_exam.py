"""An exam of untrained diffusion models by a judge whose eye is a function of the images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from expunge.audits.attacks.drawing import asked
from expunge.audits.metrics.answer_set import Cell
from expunge.audits.metrics.exam import Exam
from expunge.audits.metrics.judges import Judge
from expunge.tasks.sampling import Sampling
from tiny_pipelines import text_case

NEVER = lambda images: torch.zeros(len(images), dtype=torch.bool)  # noqa: E731


@dataclass
class Eye:
    """A judge's probabilities: says `red` of the images that `sees` (images -> bool)."""

    sees: object

    def __call__(self, images):
        yes = torch.as_tensor(np.asarray(self.sees(images)), dtype=torch.float32)
        return torch.stack([1 - yes, yes], 1)


def exam(case, sees, target="red", steps=2):
    judge = Judge("style", ("plain", target), Eye(sees), NEVER, 1.0, 100, "d" * 64)
    text = case.model.kind == "text"
    cells = [Cell(f"a {w} {o}", {"style": s}, n) for o in ("one", "two", "three") for s, words in
             (("plain", ("plain",)), ("red", ("red", "crimson"))) for n, w in enumerate(words)]  # fmt: skip
    if not text:
        cells = [Cell(3, {"style": target}), *(Cell(c, {"style": "plain"}) for c in (1, 2))]
    return Exam(tuple(cells), {"style": target}, (judge,), (0, 1), Sampling(steps, 1.0))


def text(sees, **settings):
    case = text_case()
    return case.with_(exam=exam(case, sees, **settings))


ALL = lambda images: np.ones(len(images), dtype=bool)  # noqa: E731
NONE = lambda images: np.zeros(len(images), dtype=bool)  # noqa: E731


def forced(case):
    """After the original's drawings, nothing shows the target any more."""
    for count in (1, 2, 3, 10):
        asked(case, count)
    case.exam.judges[0].probabilities.sees = NONE
    return case
