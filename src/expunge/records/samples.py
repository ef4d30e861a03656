"""samples.html: answers of the models side by side. The only page that shows data, written only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from expunge.cases.case import Case
from expunge.errors import UnmetNeed
from expunge.files import write_atomic
from expunge.seeds import generator


def sample_answers(
    case: Case, models: Mapping[str, nn.Module], split: str, count: int, seed: int = 0, new_tokens: int = 60
) -> list[dict[str, Any]]:
    """`count` rows of a split, drawn by the seed: {question, answers: [the true one, then each model's greedy answer]}."""
    data: Any = case.split(split).data
    if case.task.name != "language" or not hasattr(data, "prompt_ids"):
        raise UnmetNeed(f"expected a language case to show answers of, found {case.task.name}; samples are texts")
    rows = case.split(split).sample(count, generator(seed, "samples", split)).ids
    prompts = data.prompt_ids(rows)
    true = [data.decode(tokens[:new_tokens]) for tokens in data.answer_ids(rows)]
    if not all(prompts):  # plain text has no prompts: its first quarter is one
        whole = data.answer_ids(rows)
        prompts = [tokens[: max(len(tokens) // 4, 1)] for tokens in whole]
        true = [data.decode(t[len(p) : len(p) + new_tokens]) for t, p in zip(whole, prompts, strict=True)]
    said = [case.task.generate(m, prompts, new_tokens, end=data.end, pad=data.pad) for m in models.values()]  # type: ignore[attr-defined]
    return [
        {"question": data.decode(prompt), "answers": [truth, *(data.decode(own[i]) for own in said)]}
        for i, (prompt, truth) in enumerate(zip(prompts, true, strict=True))
    ]


def write_samples(
    path: str | Path,
    case: Case,
    models: Mapping[str, nn.Module],
    count: int,
    *,
    show_forgotten: bool = False,
    seed: int = 0,
) -> Path:
    """The page. Forgotten rows are on it only with `show_forgotten`."""
    from expunge.records.report import templates

    splits = ("retain", "forget") if show_forgotten else ("retain",)
    parts = [
        {
            "title": {"retain": "Kept", "forget": "Forgotten"}[split],
            "columns": ["true answer", *models],
            "rows": sample_answers(case, models, split, count, seed),
        }
        for split in splits
    ]
    subtitle = f"{count} rows of each split shown, drawn by seed {seed}; greedy answers"
    page = (
        templates().get_template("samples.html").render(title=f"Answers on {case.name}", subtitle=subtitle, parts=parts)
    )
    return write_atomic(Path(path), page)
