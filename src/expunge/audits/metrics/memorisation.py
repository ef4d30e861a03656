"""How well texts are remembered, teacher forced: probability, share of tokens foreseen, share of text extracted.

    probability           mean exp(-loss), loss in nats per answer token
    exact_memorisation    mean share of tokens that are the likeliest ones
    extraction_strength   mean share of a text that its own beginning brings back (0 when the last token is missed)

On forget and holdout the aim is the retrained model's value; on retain and test, higher is better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from expunge.audits.base import Check, Measured, Measurement, check
from expunge.audits.metrics.text import extraction_likelihood, extraction_strength
from expunge.audits.metrics.token_statistics import TokenStatistics
from expunge.cases.data import Split
from expunge.errors import UnmetNeed

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

SPLITS = ("forget", "retain", "holdout", "test")
FACTS: dict[str, Any] = {
    "direction": "match", "range": (0.0, 1.0), "kinds": ("language",), "needs": ("retrained", "forget"),
}  # fmt: skip


def tokens(subjects: Subjects, subject: str, split: str) -> TokenStatistics:
    """Token statistics of a subject over a split, of the pass that all checks share."""
    found = subjects.passed(subject, split).tokens
    if found is None:
        raise UnmetNeed(
            f"expected texts, found examples of {subjects.task.name}, which are no rows of tokens; leave the check out"
        )
    return TokenStatistics(found["log_p"], found["mean"], found["spread"], [row > 0.5 for row in found["hit"]])


@check("probability", source="TOFU, arXiv 2401.06121", **FACTS)
def probability(subjects: Subjects) -> list[Measurement]:
    """Mean length-normalised probability of the answers, on every split there is."""
    return _on_splits(probability, subjects, lambda subject, split: subjects.signal(subject, split, "probability"))


@check("exact_memorisation", source="memorised accuracy of arXiv 2210.01504, on answer tokens", **FACTS)
def exact_memorisation(subjects: Subjects) -> list[Measurement]:
    """Mean share of answer tokens that are the likeliest ones, on every split there is."""
    return _on_splits(
        exact_memorisation, subjects, lambda subject, split: subjects.signal(subject, split, "correctness")
    )


@check(
    "extraction_strength", source="Carlini et al., arXiv 2012.07805, as in open-unlearning without its floor", **FACTS
)
def strength(subjects: Subjects) -> list[Measurement]:
    """Mean share of each answer that its own beginning brings back by greedy decoding, on every split there is."""
    return _on_splits(
        strength, subjects, lambda subject, split: extraction_strength(tokens(subjects, subject, split).hits)
    )


@check("extraction_likelihood", source="EL_n of knowledge unlearning, arXiv 2210.01504", **FACTS)
def likelihood(subjects: Subjects, n: int = 10, rows: int | None = None) -> list[Measurement]:
    """EL_n: n-grams that greedy continuations of every prefix share with the true text. Costs a generation per prefix.

    rows: only the first so many forget rows; default: all.
    """

    def run(model: nn.Module, split: Split) -> np.ndarray:
        return el(subjects.task, model, split, n, rows)

    found = subjects.measure(lambda subject: subjects.over(("el", n, rows), subject, "forget", run))
    note = f"texts of more than {n} tokens, prompts included"
    return [likelihood.measurement(found, name=f"extraction_likelihood_{n}", split="forget", note=note)]


def el(task: Any, model: nn.Module, split: Split, n: int = 10, rows: int | None = None) -> np.ndarray:
    """(m,) EL_n of the split's texts longer than n tokens, prompts included."""
    texts = [split.data.column("input_ids")[i] for i in split.ids.tolist()][:rows]
    found = []
    for text in (text for text in texts if len(text) > n):
        prefixes = [text[:i] for i in range(1, len(text))]
        made = task.generate(model, prefixes, max_new_tokens=len(text) - 1, pad=getattr(split.data, "pad", 0))
        found.append(extraction_likelihood([row[: len(text) - i] for i, row in enumerate(made, start=1)], text, n))
    return np.array(found)


def _on_splits(item: Check, subjects: Subjects, values: Callable[[str, str], np.ndarray]) -> list[Measurement]:
    found = []
    for split in (name for name in SPLITS if subjects.unmet(name) is None):
        measured = subjects.measure(lambda subject, split=split: values(subject, split))
        lists = (
            {subject: values(subject, split).tolist() for subject in subjects.compared} if split == "forget" else None
        )
        found.append(
            item.measurement(
                Measured(measured.values, measured.intervals, lists), name=f"{item.name}_{split}", split=split,
                direction="match" if split in ("forget", "holdout") else "higher",
            )
        )  # fmt: skip
    return found
