"""GCG: a greedy search for a suffix of real tokens that makes the model say the answer (Zou et al., arXiv 2307.15043).

    minimise  L(s) = -log p(target | before, question, s, after) / n,  mean over the rows
    each step: gradient of L with respect to one-hot tokens; at each place the `top` most negative tokens; `candidates` copies
    of s with one random place replaced by a random one of these; those that decode and encode again to the same tokens are
    evaluated; the best of them becomes s

A suffix that does not survive decoding and encoding cannot be typed, so it is no attack. The search may go uphill, and the
best suffix seen is what counts. Published budget: 20 tokens, 512 candidates, 256 top, 250 to 500 steps; the defaults here
are a small machine's, and the budget is told with every number. As with the soft prompt, the suffix is found on a tenth of
the forget set and scored on the rest, or found on each item (`each`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audits.attacks.budget import Budget, attack_check, forget_scores
from expunge.audits.attacks.rows import Frame, Spot, frame, inserted, text_rows, with_prompts
from expunge.audits.attacks.soft_prompt import (
    SearchesPrompt,
    as_list,
    better_of,
    embedding_table,
    filled,
    open_model,
    soft_tokens,
)
from expunge.cases.text import encode
from expunge.errors import BadSetting
from expunge.seeds import generator
from expunge.tasks.base import evaluating, move_to_model

if TYPE_CHECKING:
    from expunge.cases.case import Case
    from expunge.cases.data import Split


@dataclass
class Found:
    """What a search ended with. queries: rows run through the model, forward or backward. history: best loss by step."""

    tokens: list[int]
    loss: float
    queries: int = 0
    unchanged: int = 0
    history: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class SuffixSearch(SearchesPrompt):
    """GCG with `tokens` tokens. opening: an affirmative beginning to aim at instead of the answer; it is then said before
    the scored answer. target_tokens: how much of the answer is aimed at, None for all of it."""

    tokens: int = 10
    steps: int = 20
    candidates: int = 64
    top: int = 64
    each: bool = False
    spot: Spot = "after"
    opening: str | None = None
    target_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "steps", "candidates", "top"):
            if getattr(self, name) < 1:
                raise BadSetting(f"expected {name} >= 1 in a suffix search, found {getattr(self, name)}; correct it")

    @property
    def name(self) -> str:
        return "gcg" + ("_opening" if self.opening else "") + ("_each" if self.each else "")

    def scores(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> np.ndarray:
        model = open_model(model, case, seed)
        shape, (_, scored) = frame(case), self.parts(case, budget, seed)
        found = self.search(model, case, budget, seed)
        suffixes = [item.tokens for item in found] if self.each else found[0].tokens
        asked = self._opened(inserted(scored, suffixes, shape, self.spot))
        found = forget_scores(model, case, asked, seed, 64)
        return better_of(found, forget_scores(model, case, scored, seed, 64), self.each)

    def search(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> list[Found]:
        """One suffix for the searched rows together, or one for each of them."""
        searched, _ = self.parts(case, budget, seed)
        shape = frame(case)
        groups = [searched.subset(torch.tensor([i])) for i in range(len(searched))] if self.each else [searched]
        return [self._search(model, case, rows, shape, seed, number) for number, rows in enumerate(groups)]

    def _search(self, model: nn.Module, case: Case, rows: Split, shape: Frame, seed: int, number: int) -> Found:
        table = embedding_table(model).weight.detach()
        size, data = table.shape[0], text_rows(rows)
        aimed = self._aim(rows, shape, size)
        batch = move_to_model(aimed.data.fetch(aimed.ids), model)
        rng = generator(seed, "gcg", number)
        allowed = torch.ones(size, dtype=torch.bool, device=table.device)
        allowed[[i for i in getattr(data.tokenizer, "all_special_ids", []) if i < size]] = False

        def losses(many: Tensor) -> Tensor:
            """(C,) mean loss over the rows with each of (C, m) suffixes."""
            parts = []
            for some in many.split(max(1, 256 // len(batch))):
                asked = filled(batch, some, size)
                parts.append(case.task.loss(case.task.forward(model, asked), asked).view(len(some), -1).mean(1))
            return torch.cat(parts)

        def gradient(tokens: Tensor) -> Tensor:
            """(m, V) of the mean loss with respect to one-hot tokens."""
            vectors = table[tokens].clone().requires_grad_()
            with torch.enable_grad(), soft_tokens(model, vectors):
                loss = case.task.loss(case.task.forward(model, batch), batch).mean()
                return torch.autograd.grad(loss, vectors)[0] @ table.T

        with evaluating(model):
            start = self._start(data.tokenizer, allowed, rng).to(table.device)
            return greedy_search(
                losses,
                gradient,
                start,
                allowed,
                rng,
                self.steps,
                self.candidates,
                self.top,
                typed_by(data.tokenizer),
                len(batch),
            )

    def _start(self, tokenizer: Any, allowed: Tensor, rng: torch.Generator) -> Tensor:
        """(m,) the letter x over and over, or another token whose repetition can be typed."""
        typed, places = typed_by(tokenizer), allowed.cpu().nonzero().flatten()
        order = places[torch.randperm(len(places), generator=rng)].tolist()
        letters = (
            []
            if tokenizer is None
            else [i for i in encode(tokenizer, " x")[:1] + encode(tokenizer, "x")[:1] if allowed[i]]
        )
        rows = [[token] * self.tokens for token in letters + order]
        return torch.tensor(next((row for row in rows if typed is None or typed(row)), rows[0]))

    def _aim(self, rows: Split, shape: Frame, size: int) -> Split:
        """The searched rows with soft tokens in the suffix's place and the target as the answer."""
        data = text_rows(rows)
        asked = inserted(rows, (size + np.arange(self.tokens)).tolist(), shape, self.spot)
        prompts = text_rows(asked).prompt_ids(asked.ids)
        if self.opening is not None:
            return with_prompts(rows, prompts, [encode(data.tokenizer, self.opening)] * len(prompts))
        answers = [answer[: self.target_tokens] for answer in data.answer_ids(rows.ids)]
        return with_prompts(rows, prompts, answers)

    def _opened(self, rows: Split) -> Split:
        if self.opening is None:
            return rows
        data = text_rows(rows)
        words = encode(data.tokenizer, self.opening)
        return with_prompts(rows, [[*prompt, *words] for prompt in data.prompt_ids(rows.ids)])

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        """At most: candidates that cannot be typed are not evaluated."""
        n = len(case.split("forget"))
        searched = n if self.each else budget.held(n)
        return {"steps": self.steps, "examples": searched, "queries": searched * self.steps * (self.candidates + 1) + n}


def greedy_search(
    losses: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    allowed: Tensor,
    rng: torch.Generator,
    steps: int,
    candidates: int,
    top: int,
    typed: Callable[[list[int]], bool] | None = None,
    rows: int = 1,
) -> Found:
    """The best tokens (m,) seen by the greedy coordinate gradient search.

    losses: (C, m) -> (C,). gradient: (m,) -> (m, V). allowed: (V,) bool. typed: whether a list of tokens can be typed.
    rows: what one evaluation of a candidate counts as queries. unchanged: steps in which no candidate could be typed.
    """
    current = start.clone()
    found = Found(as_list(current), float(losses(current[None])[0]), queries=rows)
    if typed is not None and not typed(found.tokens):
        found.loss = math.inf  # the start is only where the search begins: it counts for nothing if it cannot be typed
    top = min(top, int(allowed.sum()))
    for _ in range(steps):
        slope = gradient(current).masked_fill(~allowed, math.inf)
        best = (-slope).topk(top, dim=1).indices.cpu()
        places = torch.randint(len(current), (candidates,), generator=rng)
        picks = best[places, torch.randint(top, (candidates,), generator=rng)]
        many = current.cpu().repeat(candidates, 1)
        many[torch.arange(candidates), places] = picks
        many = many.unique(dim=0)
        if typed is not None:
            many = many[torch.tensor([typed(row) for row in many.tolist()], dtype=torch.bool)]
        found.queries += rows
        if len(many):
            values = losses(many.to(current.device))
            found.queries += rows * len(many)
            place = int(values.argmin())
            current = many[place].to(current.device)
            if float(values[place]) < found.loss:
                found.tokens, found.loss = as_list(current), float(values[place])
        else:
            found.unchanged += 1
        found.history.append(found.loss)
    return found


def typed_by(tokenizer: Any) -> Callable[[list[int]], bool] | None:
    """Whether tokens survive being written and read again; None without a tokenizer."""
    if tokenizer is None:
        return None
    return lambda tokens: encode(tokenizer, tokenizer.decode(tokens, skip_special_tokens=False)) == tokens


gcg = attack_check(
    SuffixSearch(),
    "What a suffix of real tokens, found on a tenth of the forget set, brings back of the other nine tenths.",
    kinds=("language",),
    source="arXiv 2307.15043; language attacks card, 5",
)
gcg_each = attack_check(
    SuffixSearch(each=True),
    "What a suffix of real tokens found for each forgotten item brings back; the excess over retrained counts.",
    kinds=("language",),
    source="arXiv 2307.15043; language attacks card, 5",
)
