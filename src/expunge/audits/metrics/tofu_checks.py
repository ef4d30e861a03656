"""TOFU's checks (arXiv 2401.06121) on the case's own rows and its probe tables; the formulas are in `tofu.py`.

    probe:forget_perturbed   forget questions with answer, paraphrase and wrong answers      truth ratio, forget quality
    probe:retain_perturbed   the same of kept questions                                      model utility
    probe:real_authors, probe:world_facts    general knowledge with wrong answers; where the case has them

Tables are made by `expunge.cases.tofu.candidates`. A truth ratio's right answer is the paraphrase, or the answer where there
is none. Without general knowledge (a model trained on nothing else) model utility is the harmonic mean of retain's three
components alone, and its note says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from expunge.audits.base import Measured, Measurement, check
from expunge.audits.metrics import tofu
from expunge.audits.metrics.text import rouge_l_recall
from expunge.audits.passes import run_losses
from expunge.audits.subjects import PROBE
from expunge.cases.data import Split
from expunge.cases.tofu import ANSWER, PARAPHRASE, WRONG
from expunge.errors import BadData

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

SOURCE = "TOFU, arXiv 2401.06121, as open-unlearning computes it"
FORGET, RETAIN = f"{PROBE}forget_perturbed", f"{PROBE}retain_perturbed"
KNOWLEDGE = (f"{PROBE}real_authors", f"{PROBE}world_facts")
NEW_TOKENS = 200
TOGETHER, TOGETHER_ON_A_GPU, CACHE = 128, 512, 2**34
"""Prompts answered together: decoding waits for memory and launches, so more rows cost little more time. CACHE: bytes that
their keys and values may take on a GPU."""
FACTS: dict[str, Any] = {"range": (0.0, 1.0), "kinds": ("language",), "source": SOURCE}
PAIR = (
    "never rank by forget quality alone: a model broken at random can match the retrained one's distribution on its way down; "
    "read it beside model_utility and probability_forget, and compare equal row counts only"
)


@dataclass(frozen=True)
class Losses:
    """Of n questions, nats per token: the true answer (n,), the truth ratio's right answer (n,), the wrong ones (n, k)."""

    answer: np.ndarray
    right: np.ndarray
    wrong: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """(n, 2 + k) answer, right, wrong: questions are resampled whole."""
        return np.column_stack([self.answer, self.right, self.wrong])


def losses(subjects: Subjects, subject: str, probe: str) -> Losses:
    """A subject's losses over a table of candidates; one pass, shared by all checks."""
    data = subjects.split(probe).data
    loss = subjects.over("loss", subject, probe, lambda model, rows: run_losses(subjects.task, model, rows))
    item, role = (np.asarray(data.column(name)) for name in ("item", "role"))

    def of(kind: int) -> np.ndarray:
        return loss[role == kind][np.argsort(item[role == kind], kind="stable")]

    answer, paraphrase, wrong = of(ANSWER), of(PARAPHRASE), of(WRONG)
    count = len(answer)
    if not count or len(wrong) % count or len(paraphrase) not in (0, count) or not len(wrong):
        raise BadData(
            f"expected in {probe} for every question one answer, at most one paraphrase and equally many wrong answers, found "
            f"{count}, {len(paraphrase)} and {len(wrong)}; make the table with expunge.cases.tofu.candidates"
        )
    return Losses(answer, paraphrase if len(paraphrase) else answer, wrong.reshape(count, -1))


def recall(subjects: Subjects, subject: str, split: str, new_tokens: int = NEW_TOKENS) -> np.ndarray:
    """(n,) ROUGE-L recall of greedy answers, of a split's rows or of a probe table's true answers."""
    return recalls(subjects, subject, [split], new_tokens)[0]


def recalls(subjects: Subjects, subject: str, splits: Sequence[str], new_tokens: int = NEW_TOKENS) -> list[np.ndarray]:
    """`recall` of each split, with the questions of all of them answered together."""

    def run(model: nn.Module, tables: list[Split]) -> list[np.ndarray]:
        asked = [(table.data, _questions(table)) for table in tables]
        prompts = [data.prompt_ids(ids) for data, ids in asked]
        first = asked[0][0]
        made = subjects.task.generate(
            model, [prompt for own in prompts for prompt in own], new_tokens, end=first.end, pad=first.pad,
            batch_size=_together(model, new_tokens),
        )  # fmt: skip
        found, start = [], 0
        for (data, ids), own in zip(asked, prompts, strict=True):
            said = [data.decode(tokens).strip() for tokens in made[start : start + len(own)]]
            start += len(own)
            found.append(rouge_l_recall(said, [data.decode(tokens).strip() for tokens in data.answer_ids(ids)]))
        return found

    return subjects.over_all(("rouge_l_recall", new_tokens), subject, splits, run)


def _together(model: nn.Module, new_tokens: int) -> int:
    """Prompts in a batch; each row's cache is taken as twice its answer's length in float32."""
    first = next(model.parameters(), None)
    if first is None or first.device.type == "cpu":
        return TOGETHER
    config = getattr(model, "config", None)
    layers, width = getattr(config, "num_hidden_layers", 32), getattr(config, "hidden_size", 4096)
    return min(max(CACHE // (16 * layers * width * new_tokens), 8), TOGETHER_ON_A_GPU)


def _questions(table: Split) -> torch.Tensor:
    """Row numbers of a split's questions; a probe table has each once, with its true answer."""
    if not table.name.startswith(PROBE):
        return table.ids
    return table.ids[np.flatnonzero(np.asarray(table.data.column("role")) == ANSWER)]


@check("rouge", direction="match", needs=("retrained", "forget", "retain"), **FACTS)
def rouge(
    subjects: Subjects, splits: Sequence[str] = ("forget", "retain"), new_tokens: int = NEW_TOKENS
) -> list[Measurement]:
    """ROUGE-L recall (stemmed) of greedy answers to forget and retain questions."""
    return [
        rouge.measurement(
            subjects.measure(lambda subject, split=split: recall(subjects, subject, split, new_tokens)),
            name=f"rouge_l_recall_{split}", split=split, direction="match" if split == "forget" else "higher",
        )
        for split in splits
    ]  # fmt: skip


@check("truth_ratio", direction="match", needs=("retrained", FORGET), **FACTS)
def truth_ratio(subjects: Subjects) -> list[Measurement]:
    """Truth ratio on forget questions: mean min(R, 1/R), geometric and arithmetic, and P(right) / (P(right) + P(wrong))."""
    forms = {
        "truth_ratio_forget": lambda rows: tofu.closer_to_1_better(tofu.truth_ratio_geometric(rows[:, 1], rows[:, 2:])),
        "truth_ratio_arithmetic_forget": lambda rows: tofu.closer_to_1_better(
            tofu.truth_ratio_arithmetic(rows[:, 1], rows[:, 2:])
        ),
        "truth_knowledge_forget": lambda rows: tofu.prob_mean(rows[:, 1], rows[:, 2:]),
    }
    return [
        truth_ratio.measurement(
            subjects.measure(lambda subject: losses(subjects, subject, FORGET).rows, form), name=name, split="forget"
        )
        for name, form in forms.items()
    ]


@check(
    "forget_quality",
    unit="log10 p",
    direction="higher",
    needs=("retrained", FORGET),
    **(FACTS | {"range": (None, 0.0)}),
)
def forget_quality(subjects: Subjects) -> list[Measurement]:
    """Kolmogorov-Smirnov test of truth ratios against the retrained model's: log10 p (geometric, arithmetic) and distance.

    NEVER rank by it alone. Above -1.3 (p > 0.05) the two cannot be told apart with so many rows.
    """
    found = []
    for form, suffix in ((tofu.truth_ratio_geometric, ""), (tofu.truth_ratio_arithmetic, "_arithmetic")):

        def beside(subject: str, form=form) -> np.ndarray:
            both = [losses(subjects, name, FORGET) for name in (subject, "retrained")]
            return np.stack([form(own.right, own.wrong) for own in both], axis=1)

        measured = subjects.measure(beside, lambda rows: tofu.forget_quality(rows[:, 0], rows[:, 1]))
        lists = {subject: beside(subject)[:, 0].tolist() for subject in subjects.compared}
        rows = len(beside("retrained"))
        measured = Measured(measured.values, measured.intervals, lists)
        found.append(
            forget_quality.measurement(
                measured, name=f"forget_quality{suffix}", split="forget", note=f"{rows} rows; {PAIR}"
            )
        )
        if not suffix:
            distance = subjects.measure(beside, lambda rows: tofu.kolmogorov_smirnov(rows[:, 0], rows[:, 1])[0])
            found.append(
                forget_quality.measurement(
                    distance, name="forget_quality_distance", split="forget", unit="D", direction="lower", range=(0.0, 1.0),
                    note=f"{rows} rows",
                )
            )  # fmt: skip
    return found


@check("model_utility", direction="higher", needs=("retrained", RETAIN), **FACTS)
def model_utility(subjects: Subjects, new_tokens: int = NEW_TOKENS, generate: bool = True) -> list[Measurement]:
    """Harmonic mean of probability, ROUGE-L recall and truth ratio on kept questions and on general knowledge.

    generate: False leaves ROUGE out (and says so): the cheap form for models that cannot generate.
    """
    parts = [RETAIN, *(probe for probe in KNOWLEDGE if subjects.unmet(probe) is None)]

    def sample(subject: str) -> list[np.ndarray]:
        """One table for each part: P, ROUGE and max(0, 1 - R) of every question."""
        if generate:
            recalls(subjects, subject, parts, new_tokens)
        return [_components(subjects, subject, probe, new_tokens if generate else 0) for probe in parts]

    def utility(*tables: np.ndarray) -> float:
        return tofu.model_utility([value for table in tables for value in table.mean(0)])

    names = ["probability", *(["rouge_l_recall"] if generate else []), "truth_ratio"]
    said = [
        f"{len(names) * len(parts)} components: {', '.join(names)} of {', '.join(_short(probe) for probe in parts)}"
    ]
    if len(parts) < 3:
        said.append("not TOFU's nine: the case has no real_authors or world_facts probes")
    if not generate:
        said.append("ROUGE left out")
    found = [model_utility.measurement(subjects.measure(sample, utility), split="retain", note="; ".join(said))]
    for place, probe in enumerate(parts):
        for column, name in enumerate(names):
            measured = subjects.measure(lambda subject, place=place, column=column: sample(subject)[place][:, column])
            found.append(
                model_utility.measurement(measured, name=f"utility_{name}_{_short(probe)}", split=_short(probe))
            )
    return found


def _components(subjects: Subjects, subject: str, probe: str, new_tokens: int) -> np.ndarray:
    own = losses(subjects, subject, probe)
    known = tofu.probability(own.answer) if probe == RETAIN else tofu.normalised_probability(own.answer, own.wrong)
    preferred = np.maximum(0.0, 1 - tofu.truth_ratio_geometric(own.right, own.wrong))
    said = [recall(subjects, subject, probe, new_tokens)] if new_tokens else []
    return np.column_stack([known, *said, preferred])


def _short(probe: str) -> str:
    return probe.removeprefix(PROBE).removesuffix("_perturbed")
