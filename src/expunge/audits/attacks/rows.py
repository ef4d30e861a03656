"""Token rows with other prompts and the same answers: what every prompt attack scores.

A prompt is seen as  before + question + after,  where before and after are what all prompts of the case share (a template's
ends, "Question: " and "\\nAnswer: "). Attacks put their tokens or words beside the question, not outside the template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from expunge.cases.data import Split
from expunge.cases.text import TextData, encode
from expunge.errors import UnmetNeed
from expunge.seeds import numpy_generator

if TYPE_CHECKING:
    from expunge.cases.case import Case

Spot = Literal["before", "after", "start", "end"]
"""Where tokens are put: right before or right after the question, or at the very start or end of the prompt."""
Rewrite = Callable[[str, np.random.Generator], str]
"""Question, draws of its row -> another way to ask it."""
SEEN_FOR_TEMPLATE = 64


def text_rows(split: Split) -> TextData:
    """The split's table, or `UnmetNeed` where it is no table of token rows."""
    if not isinstance(split.data, TextData):
        raise UnmetNeed(
            f"expected text as a table of token rows, found {type(split.data).__name__}; make the data with "
            "question_answer(...) or plain_text(...)"
        )
    return split.data


@dataclass(frozen=True)
class Frame:
    """Tokens that all prompts begin and end with."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def place(self, prompt: Sequence[int], spot: Spot) -> int:
        """The index in the prompt at which tokens are put."""
        inside = len(prompt) >= len(self.before) + len(self.after)
        first, last = (len(self.before), len(prompt) - len(self.after)) if inside else (0, len(prompt))
        return {"start": 0, "before": first, "after": last, "end": len(prompt)}[spot]


def frame(case: Case) -> Frame:
    """What the case's prompts share at both ends: of the forget rows and as many others as one looks at."""
    prompts: list[list[int]] = []
    for name in ("forget", "retain"):
        split = case.split(name)
        prompts += text_rows(split).prompt_ids(split.ids[:SEEN_FOR_TEMPLATE])
    if len(prompts) < 2:
        return Frame()
    before = _shared(prompts)
    rest = [prompt[len(before) :][::-1] for prompt in prompts]
    return Frame(tuple(before), tuple(_shared(rest)[::-1]))


def _shared(rows: Sequence[Sequence[int]]) -> list[int]:
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) != 1:
            break
        count += 1
    return list(rows[0][:count])


def with_prompts(
    split: Split, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] | None = None
) -> Split:
    """The split's rows, in order, with these prompts; answers stay unless given."""
    data = text_rows(split)
    ends = data.answer_ids(split.ids) if answers is None else answers
    # At least one token must come before an answer's first, or it would not be predicted.
    rows = [(list(p) or [data.pad], list(a)) for p, a in zip(prompts, ends, strict=True)]
    table = TextData([p + a for p, a in rows], [len(p) for p, _ in rows], data.tokenizer, pad=data.pad)
    return Split(split.name, table, torch.arange(len(rows)))


def inserted(split: Split, tokens: Sequence[int] | Sequence[Sequence[int]], frame: Frame, spot: Spot) -> Split:
    """The rows with tokens put into every prompt: the same for all, or a list of its own for each row."""
    prompts = text_rows(split).prompt_ids(split.ids)
    each: Any = tokens if len(tokens) and not isinstance(tokens[0], int) else [tokens] * len(prompts)
    new = []
    for prompt, own in zip(prompts, each, strict=True):
        at = frame.place(prompt, spot)
        new.append([*prompt[:at], *own, *prompt[at:]])
    return with_prompts(split, new)


def rewritten(split: Split, rewrite: Rewrite, frame: Frame, seed: int = 0) -> Split:
    """The rows with their questions rewritten as text; what stands around the question stays."""
    data, new = text_rows(split), []
    for row, prompt in zip(split.ids.tolist(), data.prompt_ids(split.ids), strict=True):
        first, last = frame.place(prompt, "before"), frame.place(prompt, "after")
        question = data.decode(prompt[first:last])
        text = rewrite(question, numpy_generator(seed, "rewrite", split.name, row))
        middle = prompt[first:last] if text == question else encode(data.tokenizer, text)
        new.append([*prompt[:first], *middle, *prompt[last:]])
    return with_prompts(split, new)


def room(case: Case, split: Split) -> int | None:
    """Tokens that still fit into the model's context beside the longest row; None where the model names no limit."""
    context = getattr(getattr(case.model, "config", None), "max_position_embeddings", None)
    data = text_rows(split)
    return None if context is None else context - max(data.lengths[i] for i in split.ids.tolist())
