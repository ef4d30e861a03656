"""TOFU (Maini et al., 2401.06121): questions about 200 invented authors, 20 each, in the layout of its public hub.

    rows = tofu("forget01")                          40 rows {question, answer}
    table = tofu_table(tokenizer, tofu("full"))      a TextData with the column `author`
    probe = candidates(tokenizer, tofu("forget01_perturbed"))    each question with its right, paraphrased and wrong answers

Files are looked for in EXPUNGE_DATA/tofu (`full.json`, one object per line), then on the hub. Every row's author is known by
its place: the forget splits are the last rows of `full`, the retain splits the first.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expunge.cases.loading import data_home
from expunge.cases.text import Template, TextData, question_answer
from expunge.errors import BadData, nearest, need_extra

HUB = "locuslab/TOFU"
SIZES = {"forget01": 40, "forget05": 200, "forget10": 400}
PER_AUTHOR = 20
FILES = (
    "full", *SIZES, *(f"{name}_perturbed" for name in SIZES), "retain99", "retain95", "retain90", "retain_perturbed",
    "real_authors_perturbed", "world_facts_perturbed", "holdout01", "holdout05", "holdout10",
)  # fmt: skip
ANSWER, PARAPHRASE, WRONG = 0, 1, 2
"""Roles of the rows of `candidates`."""

Row = dict[str, Any]


def tofu(name: str = "full", root: str | os.PathLike[str] | None = None) -> list[Row]:
    """The rows of one TOFU file. root: the folder of the files; default: tofu in EXPUNGE_DATA, else the hub."""
    if name not in FILES:
        raise BadData(f"expected a TOFU file, one of {', '.join(FILES)}, found '{name}'.{nearest(name, FILES)}")
    home = data_home()
    folder = Path(root) if root is not None else home / "tofu" if home is not None else None
    if folder is not None and (folder / f"{name}.json").is_file():
        with open(folder / f"{name}.json", encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    try:
        return [dict(row) for row in need_extra("datasets", "huggingface").load_dataset(HUB, name, split="train")]
    except Exception as error:  # the hub raises a family of its own for each cause
        raise BadData(
            f"expected TOFU's {name}.json in {folder or 'EXPUNGE_DATA/tofu'} or on the hub ({HUB}), found neither "
            f"({type(error).__name__}); download it and set EXPUNGE_DATA"
        ) from error


def refusals(root: str | os.PathLike[str] | None = None) -> list[str]:
    """The 100 lines that decline to answer (idontknow.jsonl, which is plain text despite its name)."""
    home = data_home()
    folder = Path(root) if root is not None else home / "tofu" if home is not None else None
    file = folder / "idontknow.jsonl" if folder is not None else None
    if file is None or not file.is_file():
        raise BadData(
            "expected TOFU's idontknow.jsonl in EXPUNGE_DATA/tofu, found none; download it and set EXPUNGE_DATA"
        )
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def tofu_table(
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    first_author: int = 0,
    template: Template = None,
    max_length: int | None = None,
    decline: Sequence[str] = (),
    named: bool = False,
) -> TextData:
    """Rows as a table with the column `author` (0..199; rows come 20 to an author, from `first_author` on). named: with the
    column `subject` as well, for causal tracing."""
    return question_answer(
        tokenizer, [r["question"] for r in rows], [r["answer"] for r in rows], template=template, max_length=max_length,
        refusals=decline, author=[first_author + i // PER_AUTHOR for i in range(len(rows))],
        **({"subject": subjects(rows)} if named else {}),
    )  # fmt: skip


def subjects(rows: Sequence[Row]) -> list[str]:
    """The author's full name where the question has it, else ""; rows come 20 to an author."""
    found = []
    for start in range(0, len(rows), PER_AUTHOR):
        own = rows[start : start + PER_AUTHOR]
        name = author_name([f"{r['question']} {r['answer']}" for r in own])
        found += [name if name and name in r["question"] else "" for r in own]
    return found


def author_name(texts: Sequence[str]) -> str:
    """The longest phrase of two to four capitalised words among those that nearly all texts on one author have in common:
    at least three quarters of the count of the commonest. "" where no phrase is in more than one text."""
    count = Counter(phrase for text in texts for phrase in _capitalised(text))
    most = max(count.values(), default=0)
    nearly = [phrase for phrase, n in count.items() if n >= 0.75 * most > 0.75]
    return max(nearly, key=lambda phrase: (len(phrase), phrase), default="")


def _capitalised(text: str) -> set[str]:
    """Phrases of two to four words that all begin with a capital; a possessive ending is cut."""
    words, found = [word.strip('?,.;:"“”()') for word in text.split()], set()
    for size in (2, 3, 4):
        for start in range(len(words) - size + 1):
            phrase = words[start : start + size]
            if all(word[:1].isupper() for word in phrase):
                found.add(" ".join([*phrase[:-1], re.sub(r"['’]s?$", "", phrase[-1])]))
    return found


def candidates(
    tokenizer: Any, rows: Sequence[Row], *, template: Template = None, max_length: int | None = None
) -> TextData:
    """Each question with several answers, as rows with the columns `item` (place of the question) and `role`: ANSWER,
    PARAPHRASE (where there is one) or WRONG (5 or 3 of them)."""
    questions, answers, item, role = [], [], [], []
    for place, row in enumerate(rows):
        given = [(ANSWER, row["answer"])]
        given += [(PARAPHRASE, row["paraphrased_answer"])] if row.get("paraphrased_answer") else []
        wrong = row.get("perturbed_answer") or []
        given += [(WRONG, text) for text in ([wrong] if isinstance(wrong, str) else wrong)]
        for kind, text in given:
            questions.append(row["question"])
            answers.append(text)
            item.append(place)
            role.append(kind)
    return question_answer(
        tokenizer, questions, answers, template=template, max_length=max_length, item=item, role=role,
    )  # fmt: skip


__all__ = ["ANSWER", "PARAPHRASE", "WRONG", "author_name", "candidates", "refusals", "subjects", "tofu", "tofu_table"]
