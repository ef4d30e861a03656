"""Other answers to the forget questions, written by the model that is to forget (AltPO, arXiv 2409.13474).

The model is shown question and answer, asked for another version with other facts, and sampled at temperature 1, five times per
question in the paper. An answer ends where the model begins a new question; what is empty or the true answer again is drawn
anew. One draw for each (seed, round), so that equal seeds write equal answers.

They are made from forget data: kept in memory, and on disk only where the caller names a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expunge.cases.text import TextData, encode
from expunge.errors import BadData, UnmetNeed
from expunge.files import digest_weights, write_atomic
from expunge.seeds import derive

if TYPE_CHECKING:
    from expunge.cases.data import Split

REQUEST = (
    "Write another answer to the question, as if it had been made up: plausible, in keeping with the question, but with "
    "every fact of the answer above changed."
)
LEAD = "Alternate answer:"
STOPS = ("Question:", "Q:")
"""Where the model goes on to a question of its own (as in the papers' code)."""
ROUNDS = 3
LEAST = 8
"""Tokens that must be free for an answer."""

Alternates = dict[int, list[list[int]]]
"""Row number -> token rows, the end of the answer included."""
_KEPT: dict[str, Alternates] = {}


@dataclass(frozen=True)
class Writing:
    """count: answers per question. new_tokens: of one answer, at most. folder: where they are kept, None for memory only."""

    count: int = 5
    temperature: float = 1.0
    new_tokens: int = 200
    request: str = REQUEST
    folder: str | None = None


def written(task: Any, model: nn.Module, split: Split, seed: int = 0, how: Writing = Writing()) -> Alternates:
    """Other answers for every row of the split, read back where this model has written them for these rows before.

    Raises `UnmetNeed` where there is no tokenizer or the model cannot generate, `BadData` where no round gave an answer.
    """
    data = split.data
    if not isinstance(data, TextData) or data.tokenizer is None or not hasattr(model, "generate"):
        raise UnmetNeed(
            "expected texts with a tokenizer and a model that generates, to write other answers with, found none; give your "
            "own: question_answer(..., alternates=[[...], ...])"
        )
    mark = _mark(model, split, seed, how)
    file = None if how.folder is None else Path(how.folder) / f"alternates-{mark[:32]}.json"
    if mark not in _KEPT:
        if file is not None and file.is_file():
            kept = json.loads(file.read_text("utf-8"))
            _KEPT[mark] = {int(row): answers for row, answers in kept.items()}
        else:
            _KEPT[mark] = _write(task, model, data, split.ids.tolist(), seed, how)
    if file is not None and not file.is_file():
        write_atomic(file, json.dumps(_KEPT[mark]))
    return _KEPT[mark]


def questions(data: TextData, ids: Sequence[int], request: str = REQUEST) -> list[str]:
    """What is shown to the model for these rows: its own prompt and answer, the request, and the beginning of an answer."""
    prompts, answers = data.prompt_ids(ids), data.answer_ids(ids)
    chat = bool(getattr(data.tokenizer, "chat_template", None))
    shown = []
    for prompt, answer in zip(prompts, answers, strict=True):
        said = data.decode(answer).strip()
        if chat:
            asked = f"Question: {_bare(data, prompt)}\nAnswer: {said}\n{request}"
            shown.append(_turn(data.tokenizer, asked) + LEAD)
        else:
            shown.append(f"{data.decode(prompt).strip()} {said}\n{request}\n{LEAD}")
    return shown


def _turn(tokenizer: Any, text: str) -> str:
    """A user's turn and the beginning of the answer to it."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )


def _bare(data: TextData, prompt: Sequence[int]) -> str:
    """The question of a prompt, out of the chat template's turn if it was put in one."""
    before, _, after = _turn(data.tokenizer, "<question>").partition("<question>")
    text = data.tokenizer.decode(list(prompt)).strip()
    bare = text.removeprefix(before.strip()).removesuffix(after.strip()).strip()
    return data.decode(prompt).strip() if bare == text else bare


def _write(task: Any, model: nn.Module, data: TextData, ids: list[int], seed: int, how: Writing) -> Alternates:
    prompts = [encode(data.tokenizer, text) for text in questions(data, ids, how.request)]
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    crowded = [i for i, p in zip(ids, prompts, strict=True) if context is not None and len(p) + LEAST > context]
    if crowded:
        raise BadData(
            f"expected question, answer and request within the model's context of {context} tokens, found {len(crowded)} longer "
            f"ones (rows {crowded[:5]}); give your own: question_answer(..., alternates=[[...], ...])"
        )
    room = how.new_tokens if context is None else min(how.new_tokens, context - max(map(len, prompts)))
    end = [] if data.end is None else [data.end]
    found: Alternates = {row: [] for row in ids}
    for number in range(ROUNDS):
        short = [place for place, row in enumerate(ids) if len(found[row]) < how.count]
        places = [place for place in short for _ in range(how.count - len(found[ids[place]]))]
        if not places:
            break
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "alternates", number))
            texts = task.generate(
                model, [prompts[place] for place in places], room, end=data.end, pad=data.pad, do_sample=True,
                temperature=how.temperature, top_k=0, top_p=1.0,
            )  # fmt: skip
        for place, tokens in zip(places, texts, strict=True):
            row = ids[place]
            text = _cut(data.decode(tokens))
            truth = data.decode(data.answer_ids([row])[0])
            if text and _plain(text) != _plain(truth):
                found[row].append(encode(data.tokenizer, text)[:room] + end)
    empty = [row for row, own in found.items() if not own]
    if empty:
        raise BadData(
            f"expected the model to write other answers, found none for {len(empty)} rows ({empty[:5]}) in {ROUNDS} rounds; a "
            "model that only recites cannot, so give your own: question_answer(..., alternates=[[...], ...])"
        )
    return found


def _cut(text: str) -> str:
    """The first answer: nothing after a question of the model's own, no line breaks around it."""
    for stop in STOPS:
        text = text.split(stop)[0]
    return text.strip()


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _mark(model: nn.Module, split: Split, seed: int, how: Writing) -> str:
    """What the answers depend on: weights, rows, seed and settings (not where they are kept)."""
    about = {
        "model": [type(model).__qualname__, digest_weights(model.state_dict())],
        "rows": dict(zip(split.ids.tolist(), split.data.row_digests(split.ids), strict=True)),
        "seed": seed,
        "how": {name: value for name, value in asdict(how).items() if name != "folder"},
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
