"""MUSE's checks of text that comes back (arXiv 2407.06460): VerbMem and KnowMem, in percent; PrivLeak is with the attacks.

    verbmem    ROUGE-L F1 between the greedy continuation (128 tokens) of a forget text's beginning and its true one, cut to
               as many tokens
    knowmem    ROUGE-L F1 of few-shot answers (32 tokens, cut at the next question) to questions about forget or retain texts

Their targets are the retrained model's values. `probe:verbmem` holds prompts with their true continuations where the
benchmark gives them; else the beginning of each forget row serves. `probe:knowmem_forget` and `probe:knowmem_retain` are
questions whose template is MUSE's few-shot prompt (`text.few_shot_prompt`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from expunge.audits.base import Measurement, check
from expunge.audits.metrics.text import knowledge_memorisation, verbatim_memorisation
from expunge.cases.data import Split

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

FACTS: dict[str, Any] = {
    "unit": "%", "range": (0.0, 100.0), "kinds": ("language",), "source": "MUSE, arXiv 2407.06460",
}  # fmt: skip


@check("verbmem", direction="match", needs=("retrained", "forget"), **FACTS)
def verbmem(subjects: Subjects, share: float = 0.25, new_tokens: int = 128) -> list[Measurement]:
    """Verbatim memorisation: ROUGE-L F1 between greedy continuations of forget texts and the true ones.

    share: of a forget row's answer that is given with its prompt, where the case has no probe `verbmem`.
    """
    given = subjects.unmet("probe:verbmem") is None
    where = "probe:verbmem" if given else "forget"

    def run(model: nn.Module, rows: Split) -> np.ndarray:
        prompts, answers = rows.data.prompt_ids(rows.ids), rows.data.answer_ids(rows.ids)
        if not given:
            taken = [max(math.floor(share * len(a)), 0 if p else 1) for p, a in zip(prompts, answers, strict=True)]
            prompts = [prompt + answer[:k] for prompt, answer, k in zip(prompts, answers, taken, strict=True)]
            answers = [answer[k:] for answer, k in zip(answers, taken, strict=True)]
        return verbatim_memorisation(*_texts(subjects, model, rows, prompts, answers, new_tokens))

    note = f"true continuations cut to {new_tokens} tokens" + ("" if given else f"; given: {share:g} of each answer")
    found = subjects.measure(lambda subject: subjects.over(("verbmem", share, new_tokens), subject, where, run))
    return [verbmem.measurement(found, split="forget", note=note)]


@check("knowmem_forget", direction="match", needs=("retrained", "probe:knowmem_forget"), **FACTS)
def knowmem_forget(subjects: Subjects, new_tokens: int = 32) -> list[Measurement]:
    """Knowledge memorisation of the forget texts: ROUGE-L F1 of few-shot answers."""
    found = subjects.measure(lambda subject: _knowledge(subjects, subject, "probe:knowmem_forget", new_tokens))
    return [knowmem_forget.measurement(found, split="forget")]


@check("knowmem_retain", direction="higher", needs=("retrained", "probe:knowmem_retain"), **FACTS)
def knowmem_retain(subjects: Subjects, new_tokens: int = 32) -> list[Measurement]:
    """Knowledge memorisation of the kept texts, MUSE's utility: ROUGE-L F1 of few-shot answers."""
    found = subjects.measure(lambda subject: _knowledge(subjects, subject, "probe:knowmem_retain", new_tokens))
    return [knowmem_retain.measurement(found, split="retain")]


def _knowledge(subjects: Subjects, subject: str, probe: str, new_tokens: int) -> np.ndarray:
    def run(model: nn.Module, rows: Split) -> np.ndarray:
        prompts, answers = rows.data.prompt_ids(rows.ids), rows.data.answer_ids(rows.ids)
        return knowledge_memorisation(*_texts(subjects, model, rows, prompts, answers, new_tokens, whole=True))

    return subjects.over(("knowmem", new_tokens), subject, probe, run)


def _texts(
    subjects: Subjects,
    model: nn.Module,
    rows: Split,
    prompts: list,
    answers: list,
    new_tokens: int,
    whole: bool = False,
) -> tuple[list[str], list[str]]:
    """Greedy continuations and true ones as texts. whole: the true ones are not cut to `new_tokens` tokens."""
    data = rows.data
    made = subjects.task.generate(model, prompts, new_tokens, end=data.end, pad=data.pad)
    truths = answers if whole else [answer[:new_tokens] for answer in answers]
    return [data.decode(row) for row in made], [data.decode(row) for row in truths]
