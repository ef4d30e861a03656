"""Linear probe of a language model: is the answer decided in the state of the last prompt token, said or not?

    h_l (last prompt token) -> class of the answer        logistic regression on standardised features, for each layer

A class is a number in a column of the data (a birthplace, an option), or else the answer's first token. The probe is fitted
on retain rows and on most forget rows, and scores the forget rows it was not fitted on; rows of one item (`group`: say the
paraphrases of a question) are never parted. It must be selective: with labels shuffled it should find nothing (Hewitt and
Liang, arXiv 1909.03368). Regular facts can be probed from any model that reads well: the retrained model is the zero line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audits.attacks.activations import streams
from expunge.audits.attacks.budget import Budget
from expunge.audits.attacks.lens import ReadsInside
from expunge.audits.attacks.probe import FOLDS, probed
from expunge.audits.attacks.rows import text_rows
from expunge.audits.base import Measurement, check
from expunge.errors import UnmetNeed
from expunge.seeds import generator, numpy_generator
from expunge.tasks.language import answer_index

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case
    from expunge.cases.data import Split


def prompt_states(model: nn.Module, case: Case, split: Split, seed: int = 0) -> np.ndarray:
    """(layers, n, d) float64: every stream at the token from which the first answer token is predicted."""
    found = []
    for batch, stream in streams(model, case.task, split, seed):
        last = answer_index(batch["labels"])[:, :1, None]
        found.append(torch.stack([h.gather(1, last.expand(-1, -1, h.shape[-1]))[:, 0].double().cpu() for h in stream]))
    return torch.cat(found, dim=1).numpy()


@dataclass(frozen=True)
class PromptProbe(ReadsInside):
    """Probability of the true class by the best layer's probe. layers: 0 is the embedding, None tries all."""

    column: str | None = None
    group: str | None = None
    layers: tuple[int, ...] | None = None
    shuffle: bool = False

    @property
    def name(self) -> str:
        return "prompt_probe"

    def skipped(self, subjects: Subjects) -> str | None:
        case = subjects.case
        why = super().skipped(subjects)
        if why is None and (len(case.split("forget")) < 2 or subjects.unmet("retain") is not None):
            return "expected at least 2 forgotten rows and some to keep, found fewer"
        return why

    def by_layer(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> np.ndarray:
        """(layers, n) scores of the forget rows."""
        retain, forget = case.split("retain"), case.split("forget")
        if len(retain) > budget.queries:
            retain = retain.sample(budget.queries, generator(seed, "probe", "rows"))
        known, hidden = self.classes(retain), self.classes(forget)
        if self.shuffle:
            mixed = numpy_generator(seed, "probe", "control").permutation(np.concatenate([known, hidden]))
            known, hidden = mixed[: len(known)], mixed[len(known) :]
        folds = self._folds(forget, seed)
        states = zip(prompt_states(model, case, retain, seed), prompt_states(model, case, forget, seed), strict=True)
        chosen = [pair for i, pair in enumerate(states) if self.layers is None or i in self.layers]
        return np.stack([probed(a, known, b, hidden, folds) for a, b in chosen])

    def scores(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> np.ndarray:
        found = self.by_layer(model, case, budget, seed)
        return found[found.mean(1).argmax()]

    def classes(self, split: Split) -> np.ndarray:
        """(n,) the class of each row's answer."""
        data = text_rows(split)
        if self.column is None:
            return np.array([answer[0] for answer in data.answer_ids(split.ids)])
        values = data.column(self.column)
        if not isinstance(values, Tensor):
            names = {value: i for i, value in enumerate(dict.fromkeys(values))}
            values = torch.tensor([names[value] for value in values])
        if values.dim() != 1:
            raise UnmetNeed(
                f"expected one class for each row in the column '{self.column}', found shape {tuple(values.shape)}; use another"
            )
        return values[split.ids].numpy()

    def _folds(self, forget: Split, seed: int) -> np.ndarray:
        """(n,) the fold of each row; rows of one group share it."""
        data = text_rows(forget)
        values = (
            list(range(len(forget)))
            if self.group is None
            else [data.column(self.group)[i] for i in forget.ids.tolist()]
        )
        own = [str(v.item() if isinstance(v, Tensor) else v) for v in values]
        names = list(dict.fromkeys(own))
        order = torch.randperm(len(names), generator=generator(seed, "probe", "folds")).tolist()
        place = {name: order[i] % min(FOLDS, len(names)) for i, name in enumerate(names)}
        return np.array([place[name] for name in own])

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        n, kept = len(case.split("forget")), min(len(case.split("retain")), budget.queries)
        return {"steps": 0, "examples": n - -(-n // min(FOLDS, n)), "queries": n + kept}


@check(
    "prompt_probe", needs=("retrained", "forget", "retain"), kinds=("language",), attack=True, unit="probability",
    range=(0.0, 1.0), source="arXiv 1909.03368; language attacks card, 4",
)  # fmt: skip
def prompt_probe(
    subjects: Subjects, budget: Budget = Budget(), column: str | None = None, group: str | None = None,  # noqa: B008
    layers: tuple[int, ...] | None = None,
) -> list[Measurement]:  # fmt: skip
    """Probability of the true answer's class by a linear probe of the last prompt token, best layer; and its selectivity."""
    attack = PromptProbe(column, group, layers)
    if attack.skipped(subjects) is not None:
        return []
    case, seed = subjects.case, subjects.seed
    control = PromptProbe(column, group, layers, shuffle=True)
    tables = {s: attack.by_layer(subjects.model(s), case, budget, seed) for s in subjects.compared}
    shuffled = {s: control.by_layer(subjects.model(s), case, budget, seed) for s in subjects.compared}
    best = {s: int(table.mean(1).argmax()) for s, table in tables.items()}
    found = {s: tables[s][best[s]] for s in tables}
    selective = {s: found[s] - shuffled[s][best[s]] for s in tables}
    curves = {s: {"layer": list(range(len(t))), "probability": t.mean(1).tolist()} for s, t in tables.items()}
    note = f"best layer: {', '.join(f'{s} {layer}' for s, layer in best.items())}"

    def told(name: str, values: dict[str, np.ndarray], limits: tuple[float, float]) -> Measurement:
        measured = subjects.measure(lambda s: values[s])
        lists = {s: v.tolist() for s, v in values.items()}
        return prompt_probe.measurement(
            measured, name=name, split="forget", range=limits, per_example=lists, curves=curves, note=note
        )

    return [told("probe_probability", found, (0.0, 1.0)), told("probe_selectivity", selective, (-1.0, 1.0))]
