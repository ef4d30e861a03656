"""Soft prompt: the best that any prompt beside the question could do, since its tokens need not be words.

    v* = argmin_v  mean_i  -log p(answer_i | before, question_i, v, after) / n_i        v in R^(m x d), Adam

Two ways to spend it. On a tenth of the forget set, scored on the other nine tenths: no scored answer was shown, so what
comes back was there (as with relearning). Or on each scored item apart (`each`): then the vectors carry the answer in, a
retrained model says it too, and only the excess over it counts; it bounds what a search for tokens can reach on that item.

(Soft prompts: Lester et al., arXiv 2104.08691; as an attack on unlearning: Schwinn et al., arXiv 2402.09063.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audits.attacks.budget import Attack, Budget, attack_check, forget_scores
from expunge.audits.attacks.rows import Frame, Spot, frame, inserted, room
from expunge.audits.attacks.unwrapping import innermost
from expunge.cases.data import Split
from expunge.errors import BadSetting, UnmetNeed
from expunge.parts.prompts import rows_added
from expunge.seeds import generator
from expunge.tasks.base import Batch, Task, evaluating, move_to_model

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case


def embedding_table(model: nn.Module) -> nn.Embedding:
    """The input embeddings of a language model, or `UnmetNeed`."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(table, nn.Module) or not hasattr(table, "weight"):
        raise UnmetNeed(
            f"expected a language model with a table of input embeddings, found {type(model).__name__}; take a guard off first, "
            "or leave prompt searches out"
        )
    return table  # type: ignore[return-value]


def soft_tokens(model: nn.Module, vectors: Tensor) -> AbstractContextManager[None]:
    """Inside, token V + j means the vector j of (m, d), V the size of the vocabulary; gradients reach the vectors."""
    return rows_added(embedding_table(model), vectors)


def best_vectors(
    model: nn.Module, task: Task, rows: Split, start: Tensor, steps: int, lr: float, batch_size: int = 64
) -> Tensor:
    """(m, d) after `steps` of Adam on the mean loss of rows that hold soft tokens. The model stays as it is.

    Rows with soft tokens of their own do not disturb each other: Adam scales each number by its own gradients, and all
    rows are summed in every step.
    """
    vectors = start.detach().clone().requires_grad_()
    mover = torch.optim.Adam([vectors], lr=lr)
    batches = [move_to_model(batch, model) for batch in rows.batches(batch_size)]
    with evaluating(model), torch.enable_grad(), soft_tokens(model, vectors):
        for _ in range(steps):
            mover.zero_grad()
            for batch in batches:
                loss = task.loss(task.forward(model, batch), batch).sum()
                vectors.grad = _added(vectors.grad, torch.autograd.grad(loss, vectors)[0])
            mover.step()
    return vectors.detach()


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def open_model(model: nn.Module, case: Case, seed: int) -> nn.Module:
    """The model itself, or the one inside a wrapper that has no embeddings or passes no gradient."""
    if getattr(model, "get_input_embeddings", lambda: None)() is not None:
        batch = next(case.split("forget").batches(1))
        with evaluating(model), torch.enable_grad():
            if case.task.forward(model, move_to_model(batch, model)).prediction.requires_grad:
                return model
    return innermost(model, case, seed)


def better_of(found: np.ndarray, plain: np.ndarray, each: bool) -> np.ndarray:
    """(n,) scores of an attacker who also has the plain prompt: the better of the two for each item, or on the whole.

    A prompt found on few rows can harm the others, and nobody need use it."""
    return np.maximum(found, plain) if each else max(found, plain, key=lambda scores: float(scores.mean()))


class SearchesPrompt(Attack):
    """Base of attacks that search tokens beside the question: on a part of the forget set, or on each item (`each`)."""

    tokens: int
    each: bool
    spot: Spot

    def skipped(self, subjects: Subjects) -> str | None:
        case = subjects.case
        if case.task.name != "language":
            return f"expected a language model, found {case.task.name}"
        if len(case.split("forget")) < 2 and not self.each:
            return "expected at least 2 forgotten rows, one to search on and one to score, found 1"
        space = room(case, case.split("forget"))
        if space is not None and space < self.tokens:
            return f"expected room for {self.tokens} more tokens in the model's context, found {space}"
        if getattr(case.model, "get_input_embeddings", lambda: None)() is None:
            return f"expected a table of input embeddings, found none in {type(case.model).__name__}"
        return None

    def parts(self, case: Case, budget: Budget, seed: int) -> tuple[Split, Split]:
        """The rows searched on and the rows scored."""
        forget = case.split("forget")
        if self.each:
            return forget, forget
        order = torch.randperm(len(forget), generator=generator(seed, "prompt rows"))
        held = budget.held(len(forget))
        return forget.subset(order[:held].sort().values), forget.subset(order[held:].sort().values)

    def positions(self, case: Case, budget: Budget, seed: int) -> Tensor | None:
        if self.each:
            return None
        n = len(case.split("forget"))
        return torch.randperm(n, generator=generator(seed, "prompt rows"))[budget.held(n) :].sort().values

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        raise UnmetNeed(
            f"expected an attack that changes the model, found {self.name}, which changes prompts; call scores(...)"
        )


@dataclass(frozen=True)
class SoftPrompt(SearchesPrompt):
    """Continuous tokens beside the question. lr: of Adam, in units of the embeddings' root mean square."""

    tokens: int = 8
    steps: int = 50
    lr: float = 0.1
    each: bool = False
    spot: Spot = "after"

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.steps < 1 or not self.lr > 0:
            raise BadSetting(
                f"expected tokens >= 1, steps >= 1 and lr > 0 of a soft prompt, found {self.tokens}, {self.steps}, {self.lr}; "
                "correct them"
            )

    @property
    def name(self) -> str:
        return "soft_prompt_each" if self.each else "soft_prompt"

    def scores(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> np.ndarray:
        model, shape = open_model(model, case, seed), frame(case)
        table = embedding_table(model).weight.detach()
        searched, scored = self.parts(case, budget, seed)
        count = len(searched) if self.each else 1
        # Start near real embeddings: their mean, and a little of their spread so that tokens can part.
        rng = generator(seed, "soft prompt")
        noise = torch.randn(count * self.tokens, table.shape[1], generator=rng).to(table)
        start = table.mean(0) + 0.1 * table.std(0) * noise
        lr = self.lr * float(table.square().mean().sqrt())
        size = table.shape[0]
        vectors = best_vectors(model, case.task, self._asked(searched, shape, size), start, self.steps, lr)
        with soft_tokens(model, vectors):
            found = forget_scores(model, case, self._asked(scored, shape, size), seed, 64)
        return better_of(found, forget_scores(model, case, scored, seed, 64), self.each)

    def _asked(self, split: Split, shape: Frame, size: int) -> Split:
        first = size + np.arange(self.tokens)
        if not self.each:
            return inserted(split, first.tolist(), shape, self.spot)
        own = [(first + self.tokens * number).tolist() for number in range(len(split))]
        return inserted(split, own, shape, self.spot)

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        n = len(case.split("forget"))
        searched = n if self.each else budget.held(n)
        return {
            "steps": self.steps,
            "examples": searched,
            "queries": searched * self.steps + n - (0 if self.each else searched),
        }


def filled(batch: Batch, tokens: Tensor, size: int) -> Batch:
    """The batch once for each of C token lists (C, m), soft token V + j replaced by token j: C * B rows, list by list."""
    ids = batch["input_ids"]
    soft = ids >= size
    new = torch.where(soft[None], tokens[:, (ids - size).clamp(min=0)], ids[None]).flatten(0, 1)
    many = {
        name: value.repeat(len(tokens), *[1] * (value.dim() - 1)) if isinstance(value, Tensor) else value
        for name, value in batch.columns.items()
    }
    return Batch(batch.ids.repeat(len(tokens)), many | {"input_ids": new})


def as_list(tokens: Sequence[int] | Tensor) -> list[int]:
    """Token ids as plain numbers."""
    return tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)


soft_prompt = attack_check(
    SoftPrompt(),
    "What a soft prompt, found on a tenth of the forget set, brings back of the other nine tenths.",
    kinds=("language",),
    source="arXiv 2402.09063; language attacks card, 5",
)
soft_prompt_each = attack_check(
    SoftPrompt(each=True),
    "What a soft prompt found for each forgotten item brings back: the upper bound of prompt searches on that item.",
    kinds=("language",),
    source="arXiv 2402.09063; language attacks card, 5",
)
