"""What one forward pass tells of every token, and the membership scores that need a pass of their own.

For each answer token t: log p_t, the mean mu_t and the spread sigma_t of log p_t(v) under p_t, and whether the likeliest
token is the true one. From these come, without another pass, the six scores of `Language.signals` (loss, zlib, Min-K% and
Min-K%++ at 20 and 40%) and the memorisation metrics of `text.py`. The scores below need more:

    reference   NLL_ref(x) - NLL(x)                       another model's pass (arXiv 2012.07805)
    lower_case  -NLL(x) / NLL(lower(x))                   a pass over the lower-cased text (the same)
    recall      LL(x | P) / LL(x)                         a pass after known non-members P (ReCaLL, arXiv 2406.15968)
    gradnorm    -mean over tensors of ||grad NLL(x)||_p   a backward pass for each text (arXiv 2402.17012)

All are oriented "higher = more likely a member"; NLL and LL are means over a text's own tokens, in nats.

Departures: open-unlearning's gradnorm runs in training mode, so dropout draws into the score, and zeroes the gradients
that a training may be holding; here the model runs in eval mode, `.grad` is never touched and modes come back as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from expunge.audits.passes import by_length, texts_at_once
from expunge.cases.data import Split
from expunge.cases.text import TextData, encode
from expunge.errors import BadModel, BadSetting
from expunge.tasks.base import evaluating, move_to_model

if TYPE_CHECKING:
    from expunge.tasks.language import Language

SMALLEST = 1e-12
"""Nats per token below which a ratio's denominator counts as this."""


@dataclass(frozen=True)
class TokenStatistics:
    """One array of n_i numbers for each text, in the order of the split: nats, nats, nats, bool."""

    log_p: list[np.ndarray]
    mean: list[np.ndarray]
    spread: list[np.ndarray]
    hits: list[np.ndarray]

    @property
    def log_likelihood(self) -> np.ndarray:
        """(n,) mean log p over each text's tokens, nats."""
        return np.array([row.mean() for row in self.log_p])


def token_statistics(task: Language, model: nn.Module, split: Split, batch_size: int | None = None) -> TokenStatistics:
    """One forward pass over the split, in eval mode. Texts of like length share a batch, so that little is padding."""
    order = by_length(split)
    found: dict[str, list[np.ndarray]] = {
        name: [np.empty(0)] * len(split) for name in ("log_p", "mean", "spread", "hit")
    }
    with evaluating(model):
        for places in order.split(batch_size or texts_at_once(model)):
            batch = move_to_model(split.data.fetch(split.ids[places]), model)
            table = {name: value.cpu() for name, value in task.statistics(task.forward(model, batch), batch).items()}
            for name, rows in found.items():
                for row, place in enumerate(places.tolist()):
                    rows[place] = table[name][row][table["filled"][row]].double().numpy()
    return TokenStatistics(found["log_p"], found["mean"], found["spread"], [row > 0.5 for row in found["hit"]])


def reference_score(own: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(n,) from mean log-likelihoods under the model and under the reference."""
    return own - reference


def lower_case_score(own: np.ndarray, lowered: np.ndarray) -> np.ndarray:
    """(n,) at most 0: minus the ratio of negative log-likelihoods of the text and of its lower-cased form."""
    return own / np.maximum(-lowered, SMALLEST)


def recall_score(after_prefix: np.ndarray, own: np.ndarray) -> np.ndarray:
    """(n,) at least 0: above 1 where foreign context makes the text less likely, as it does to a member."""
    return after_prefix / np.minimum(own, -SMALLEST)


def lower_cased(split: Split) -> Split:
    """The same prompts with lower-cased answers (a prompt may hold the words of a chat template, which have no case)."""
    data, rows = _text(split), split.ids.tolist()
    answers = [encode(data.tokenizer, data.decode(answer).lower()) for answer in data.answer_ids(split.ids)]
    ends = [[own[-1]] if own[-1] == data.end else [] for own in data.answer_ids(split.ids)]
    prompts = data.prompt_ids(split.ids)
    tokens = [p + a + e for p, a, e in zip(prompts, answers, ends, strict=True)]
    return _whole(f"{split.name}, lower case", data, tokens, [data.starts[i] for i in rows])


def after_prefix(split: Split, prefix: Sequence[int]) -> Split:
    """Every row after the tokens `prefix`, which become part of its prompt."""
    data, rows = _text(split), split.ids.tolist()
    tokens = [[*prefix, *data.tokens[i]] for i in rows]
    return _whole(f"{split.name}, after a prefix", data, tokens, [len(prefix) + data.starts[i] for i in rows])


def shots_that_fit(shots: Sequence[Sequence[int]], longest: int, context: int | None) -> list[list[int]]:
    """The shots, in order, that leave room for the longest text in the model's context; at least one must fit."""
    room = float("inf") if context is None else context - longest
    kept: list[list[int]] = []
    for shot in shots:
        if sum(map(len, kept)) + len(shot) <= room:
            kept.append(list(shot))
    if not kept:
        raise BadSetting(
            f"expected room for at least one text of non-members before texts of {longest} tokens, found a context of {context}; "
            "leave the score 'recall' out"
        )
    return kept


def gradient_norms(task: Language, model: nn.Module, split: Split, p: float = 2.0) -> np.ndarray:
    """(n,) mean over parameter tensors of the p-norm (1, 2 or inf) of the gradient of a text's mean NLL. One backward each.

    The score is its negative: a member's gradient is small. Parameters that do not reach the loss are left out.
    """
    if p not in (1, 2, float("inf")):
        raise BadSetting(f"expected the norm p as 1, 2 or infinity, found {p}; use one of them")
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not wanted:
        raise BadModel("expected parameters that take gradients, found none; leave the score 'gradnorm' out")
    found = np.empty(len(split))
    with evaluating(model):
        for place, row in enumerate(split.ids.split(1)):
            batch = move_to_model(split.data.fetch(row), model)
            with torch.enable_grad():
                loss = task.loss(task.forward(model, batch), batch).sum()
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            found[place] = np.mean([float(g.norm(p=p)) for g in gradients if g is not None])
    return found


def _text(split: Split) -> TextData:
    if not isinstance(split.data, TextData):
        raise BadSetting(
            f"expected text rows, found {type(split.data).__name__}; make them with question_answer(...) or plain_text(...)"
        )
    return split.data


def _whole(name: str, data: TextData, tokens: list[list[int]], starts: list[int]) -> Split:
    table = TextData(tokens, starts, data.tokenizer, pad=data.pad)
    return Split(name, table, torch.arange(len(table)))
