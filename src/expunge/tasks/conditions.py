"""What a generative model is conditioned on: class ids or prompts, and how one condition is made from another.

A rule says which condition stands in for a row's own:

    "null"            no condition: the null class, or the empty prompt
    "next"            (c + 1) mod K, classes only (SalUn's redirect)
    "3"               class 3
    "red -> plain"    the row's own prompt, with these words replaced (their tokens, wherever they stand in it);
                      "red | crimson -> plain" replaces either
    "a painting"      this prompt
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.errors import BadSetting, UnmetNeed
from expunge.tasks.base import Batch

ARROW = "->"
BANK = 256
"""Rows among whose images another answer to a condition is drawn (at most this many, and at most 64 MiB of them)."""


@dataclass(frozen=True)
class ClassConditions:
    """Class ids. count: K, the null id not counted. null: id of "no class", or None where the model has none."""

    count: int
    null_id: int | None

    def like(self, condition: Tensor) -> Tensor:
        """The null condition in the shape of some conditions (B,)."""
        if self.null_id is None:
            raise UnmetNeed(
                "expected a model with a null class (guidance and label dropping need it), found none; load it with null=id, "
                "or use guidance 1"
            )
        return torch.full_like(condition, self.null_id)

    def replaced(self, condition: Tensor, rule: str) -> Tensor:
        """(B,) the ids that the rule puts in place of these."""
        if rule == "null":
            return self.like(condition)
        if rule == "next":
            return torch.where(condition < self.count, (condition + 1) % self.count, condition)
        if not rule.strip().lstrip("-").isdigit():
            raise BadSetting(
                f"expected a rule for classes: null, next, or a class number, found '{rule}'; words serve text-conditional "
                "models only"
            )
        return torch.full_like(condition, self.number(rule))

    def number(self, rule: str | int) -> int:
        """A class id from its text, checked against the model's classes."""
        value = int(rule)
        if not 0 <= value < self.count:
            raise BadSetting(f"expected a class in 0..{self.count - 1}, found {value}; name one of the model's classes")
        return value

    def of(self, what: Sequence[int] | Tensor) -> Tensor:
        """(N,) class ids as conditions."""
        return torch.as_tensor(what, dtype=torch.int64)


class TextConditions:
    """Prompts as padded token ids (B, L), as the model's own tokenizer writes them."""

    def __init__(self, tokenizer: Any, length: int):
        self.tokenizer, self.length = tokenizer, length

    def __deepcopy__(self, memo: dict[int, Any]) -> TextConditions:
        return self  # a tokenizer is never changed

    def of(self, prompts: Sequence[str] | str) -> Tensor:
        """(N, L) int64 token ids of N prompts, padded (and cut) to the model's length as diffusers does."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        found = self.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return found.input_ids

    def like(self, condition: Tensor) -> Tensor:
        """The empty prompt, once for each row."""
        return self.of("").to(condition.device).expand(len(condition), -1)

    def words(self, text: str) -> list[int]:
        """Token ids of some words, without start, end and padding.

        Raises BadSetting where the tokenizer has no token for a part of them."""
        ids = list(self.tokenizer(text.strip(), add_special_tokens=False).input_ids)
        unknown = self.tokenizer.unk_token_id
        if not ids or unknown in ids:
            raise BadSetting(
                f"expected a concept that the model's tokenizer can write, found '{text.strip()}', of which it knows no "
                "token for a part; use other words for the concept"
            )
        return ids

    def content(self, row: Tensor) -> list[int]:
        """Token ids of one prompt (L,) between its start and its end."""
        ids = row.tolist()
        start = 1 if ids and ids[0] == self.tokenizer.bos_token_id else 0
        end = self.tokenizer.eos_token_id
        return ids[start : ids.index(end, start)] if end in ids[start:] else ids[start:]

    def text(self, content: Sequence[int]) -> str:
        """Some token ids as words. A CLIP tokenizer that is read back from files may leave its marks of a word's end in."""
        return str(self.tokenizer.decode(list(content))).replace("</w>", " ").strip()

    def padded(self, content: Sequence[int]) -> list[int]:
        """Token ids of one prompt (L) from those of its content, cut where they do not fit."""
        tok = self.tokenizer
        start = [] if tok.bos_token_id is None else [tok.bos_token_id]
        kept = [*start, *list(content)[: self.length - len(start) - 1], tok.eos_token_id]
        return kept + [tok.pad_token_id] * (self.length - len(kept))

    def replaced(self, condition: Tensor, rule: str) -> Tensor:
        """(B, L) the prompts that the rule puts in place of these."""
        if rule == "null":
            return self.like(condition)
        if rule == "next":
            raise BadSetting(
                "expected a rule for prompts: null, 'words -> other words', or a prompt, found 'next', which serves classes; "
                "say which concept stands in"
            )
        if ARROW not in rule:
            return self.of(rule).to(condition.device).expand(len(condition), -1)
        old, new = (part.strip() for part in rule.split(ARROW, 1))
        targets, other = [self.words(word) for word in old.split("|")], self.words(new) if new else []
        rows = []
        for row in condition.cpu():
            content = self.content(row)
            for target in targets:
                content = _spliced(content, target, other)
            rows.append(self.padded(content))
        return torch.tensor(rows, dtype=condition.dtype, device=condition.device)

    def contains(self, condition: Tensor, text: str) -> Tensor:
        """(B,) bool: whether the words' tokens stand in each prompt."""
        target = self.words(text)
        return torch.tensor([_find(self.content(row), target) is not None for row in condition.cpu()])


Conditions = ClassConditions | TextConditions


def _find(content: list[int], target: list[int], start: int = 0) -> int | None:
    for i in range(start, len(content) - len(target) + 1):
        if content[i : i + len(target)] == target:
            return i
    return None


def _spliced(content: list[int], target: list[int], other: list[int]) -> list[int]:
    """Every occurrence of some tokens replaced by others."""
    result, at = [], 0
    while (found := _find(content, target, at)) is not None:
        result += content[at:found] + other
        at = found + len(target)
    return result + content[at:]


def answer_bank(data: Any, images: str, condition: Callable[[Batch], Tensor]) -> dict[str, Tensor]:
    """`images` and `condition` of some rows, spread evenly over a table: what `another_answer` draws from."""
    ids = torch.linspace(0, len(data) - 1, min(BANK, len(data))).long().unique()
    rows = data.fetch(ids)
    fits = max(1, 2**26 // max(rows[images][0].numel() * 4, 1))
    kept = slice(None, None, max(1, -(-len(ids) // fits)))
    return {"images": rows[images][kept], "condition": condition(rows)[kept]}


def another_answer(bank: dict[str, Tensor], own: Tensor, rng: torch.Generator) -> Tensor:
    """(B, ...) for each condition (B,) or (B, L) an image of the bank under another one."""
    differs = (
        (own.cpu()[:, None] != bank["condition"][None].cpu()).reshape(len(own), len(bank["condition"]), -1).any(-1)
    )
    if not bool(differs.any(1).all()):
        raise BadSetting(
            "expected rows with other conditions to draw another answer from, found none; use policy='noise'"
        )
    return bank["images"][torch.multinomial(differs.float(), 1, generator=rng)[:, 0]]
