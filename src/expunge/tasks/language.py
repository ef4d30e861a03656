"""Language: causal language models of any architecture of transformers, or any `nn.Module` that returns (B, T, V) logits.

A row is a prompt and its answer (or plain text, which is all answer). Columns of a batch, padded on the right:

    input_ids (B, T) int64    attention_mask (B, T)    labels (B, T): the answer's tokens, -100 on prompt and padding
    _pad: padding token       _refusals: token lists of refusals, where the data has some

The token at position t is predicted at t - 1; the end-of-text after an answer is part of it. Only the logits that predict
an answer's token are ever computed: `Output.prediction` is (B, L, V), left-aligned, L the most answer tokens in the
batch. A mean over an answer's tokens and a sum over them are two things: `loss` is the mean, `log_likelihood` the sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import BadSetting, UnmetNeed
from expunge.tasks.base import (
    Batch,
    Choice,
    Measurements,
    Output,
    PerExample,
    Readings,
    Task,
    evaluating,
    move_to_model,
)
from expunge.tasks.head import Pieces, mapped, recomputing, splits_off, states_at

RELABEL_POLICIES = ("other", "refusal", "random", "alternates")
NO_ANSWER = -100
"""In `labels`: a position that is not part of the answer (torch's and transformers' own mark)."""
SMALLEST_VARIANCE = 1e-6
"""Of a token's log-probability, below which Min-K%++ divides by this instead."""
STAGE = 32
"""Tokens that greedy answers are written in a row before those that have ended are let go."""
CACHED = 2**16
"""Logits that a core's cache holds beside what is made of them."""


def nll(logits: Tensor, answers: Tensor) -> Tensor:
    """(N,) negative log-likelihood in nats of each answer."""
    return F.cross_entropy(logits, answers, reduction="none")


def token_statistics(logits: Tensor, answers: Tensor) -> Tensor:
    """(N, 4) of each choice: log p of the answer, mean and standard deviation of log p(v) under p, and whether the answer
    is the likeliest. All that membership and memorisation scores read.

    With x = logits - max and e = exp x, log p = x - log sum e, so one exponential gives all four: the spread of x is that of
    log p. On CPU a few rows at a time, so that they stay in the cache: half the time of whole tables.
    """
    rows = max(CACHED // logits.shape[-1], 1) if logits.device.type == "cpu" else len(answers)
    pieces = zip(logits.split(max(rows, 1)), answers.split(max(rows, 1)), strict=True)
    return torch.cat([_statistics(own, truth) for own, truth in pieces])


def _statistics(logits: Tensor, answers: Tensor) -> Tensor:
    top, likeliest = logits.max(-1)
    x = logits - top[:, None]
    e = x.exp()
    total = e.sum(-1)
    log_total = total.log()
    first = torch.linalg.vecdot(e, x) / total
    second = torch.linalg.vecdot(e * x, x) / total
    own = x.gather(1, answers[:, None]).squeeze(1) - log_total
    spread = (second - first.square()).clamp_min(SMALLEST_VARIANCE).sqrt()
    return torch.stack([own, first - log_total, spread, (likeliest == answers).to(own.dtype)], dim=-1)


@dataclass(frozen=True)
class Language(Task):
    """Next-token prediction of answers.

    chunk: tokens whose logits are in memory together (see `head`); None: as many as make 2^25 logits.
    gradient_checkpointing: blocks are run again in the backward pass instead of keeping their activations; for models of
        transformers, in train mode.
    """

    chunk: int | None = None
    gradient_checkpointing: bool = False
    name = "language"
    utility = "probability"
    input = "input_ids"
    labels = "labels"
    ragged = True

    # -- running ---------------------------------------------------------------------------------------------------
    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """The logits (B, L, V) that predict the answers' tokens, made when they are read."""
        where = answer_index(batch[self.labels])
        with recomputing(model) if self.gradient_checkpointing and torch.is_grad_enabled() else nullcontext():
            if not splits_off(model):
                return Output(logits_at(model, batch, where))
            states = states_at(model, where, batch["input_ids"].shape, partial(_run, model, batch))
            return Pieces(states, model, self.chunk)

    def answers_at(self, batch: Batch) -> Tensor:
        """(B, L) the answers' tokens, left-aligned, -100 beyond an example's own."""
        labels = batch[self.labels]
        where = answer_index(labels)
        own = labels[:, 1:].gather(1, where)
        return own.masked_fill(~_filled(labels, where), NO_ANSWER)

    def choices(self, batch: Batch) -> PerExample:
        """(B,) number of answer tokens n_i."""
        return (batch[self.labels][:, 1:] != NO_ANSWER).sum(1).float()

    def per_choice(
        self, function: Choice, output: Output, batch: Batch, other: Output | None = None, reduce: str = "mean"
    ) -> Tensor:
        answers = self.answers_at(batch)
        filled = answers != NO_ANSWER
        found = mapped(function, [output] if other is None else [output, other], filled, answers[filled])
        table = found.new_zeros((*filled.shape, *found.shape[1:]))
        table[filled] = found
        if reduce == "none":
            return table
        total = table.sum(1)
        if reduce == "sum":
            return total
        count = filled.sum(1).clamp_min(1).to(total.dtype)
        return total / (count if total.dim() == 1 else count[:, None])

    def spots(self, batch: Batch) -> Tensor:
        return batch[self.labels] != NO_ANSWER

    def real(self, batch: Batch) -> Tensor:
        return batch["attention_mask"].bool()

    def joined(self, batches: Sequence[Batch]) -> Batch:
        longest = max(b["input_ids"].shape[1] for b in batches)
        return super().joined([self._padded(b, longest) for b in batches])

    def _padded(self, batch: Batch, length: int) -> Batch:
        missing = length - batch["input_ids"].shape[1]
        if not missing:
            return batch
        fill = {"input_ids": batch.columns.get("_pad", 0), "attention_mask": 0, self.labels: NO_ANSWER}
        return batch.with_columns(**{k: F.pad(batch[k], (0, missing), value=v) for k, v in fill.items()})

    # -- losses and distances --------------------------------------------------------------------------------------
    def loss(self, output: Output, batch: Batch) -> PerExample:
        """Mean negative log-likelihood per answer token, nats: S_i / n_i."""
        return self.per_choice(nll, output, batch)

    def log_likelihood(self, output: Output, batch: Batch) -> PerExample:
        """Log-likelihood of the whole answer, nats: -S_i, a sum over its tokens."""
        return -self.per_choice(nll, output, batch, reduce="sum")

    def divergence(self, output: Output, other: Output, batch: Batch, temperature: float = 1.0) -> PerExample:
        """KL(other || output) in nats, mean over the answer's tokens."""

        def kl(logits: Tensor, _answers: Tensor, target: Tensor) -> Tensor:
            log_q, log_p = F.log_softmax(logits / temperature, -1), F.log_softmax(target / temperature, -1)
            return (log_p.exp() * (log_p - log_q)).sum(-1)

        return self.per_choice(kl, output, batch, other)

    def relabel(self, batch: Batch, rng: torch.Generator, policy: str = "other") -> Batch:
        """The same prompts with another answer: `other` (of another row of the batch), `refusal` (a line of `_refusals`),
        `random` (uniform tokens, the end kept), `alternates` (one of the row's own, column `_alternates` by row id)."""
        if policy not in RELABEL_POLICIES:
            raise BadSetting(
                f"expected a relabel policy of language, one of {RELABEL_POLICIES}, found {policy!r}; use one of them"
            )
        answers = self.answer_tokens(batch)

        def draw(count: int) -> int:
            return int(torch.randint(count, (1,), generator=rng))

        if policy == "other":
            shift = 1 + draw(len(answers) - 1) if len(answers) > 1 else 0
            new = [answers[(i + shift) % len(answers)] for i in range(len(answers))]
        elif policy == "random":
            size = int(batch.columns.get("_vocabulary") or int(batch["input_ids"].max()) + 1)
            new = [torch.randint(size, (len(a) - 1,), generator=rng).tolist() + a[-1:] for a in answers]
        elif policy == "refusal":
            lines = self._needed(batch, "_refusals", "refusals", "pass question_answer(..., refusals=[...])")
            new = [list(lines[draw(len(lines))]) for _ in answers]
        else:
            table = self._needed(
                batch, "_alternates", "alternative answers", "pass question_answer(..., alternates=...)"
            )
            new = [list(table[i][draw(len(table[i]))]) for i in batch.ids.tolist()]
        return self.with_answers(batch, new)

    def with_answers(self, batch: Batch, answers: Sequence[Sequence[int]]) -> Batch:
        """The same prompts with these answers, one for each row."""
        prompts = self.prompts(batch)
        rows = [p + list(a) for p, a in zip(prompts, answers, strict=True)]
        return batch.with_columns(**padded(rows, [len(p) for p in prompts], batch))

    @staticmethod
    def _needed(batch: Batch, column: str, what: str, remedy: str) -> Any:
        found = batch.columns.get(column)
        if not found:
            raise UnmetNeed(f"expected the data to have {what} to relabel with, found none; {remedy}")
        return found

    def prompts(self, batch: Batch) -> list[list[int]]:
        """Each row's tokens before its first answer token."""
        ids, labels = batch["input_ids"].tolist(), batch[self.labels].tolist()
        return [
            row[: next((t for t, y in enumerate(own) if y != NO_ANSWER), 0)]
            for row, own in zip(ids, labels, strict=True)
        ]

    def answer_tokens(self, batch: Batch) -> list[list[int]]:
        """Each row's answer tokens."""
        return [[y for y in own if y != NO_ANSWER] for own in batch[self.labels].tolist()]

    def answers(self, batch: Batch) -> None:
        """None: an answer is no single number (see `answer_tokens`, `answers_at`)."""
        return None

    # -- generating ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 200,
        end: int | Sequence[int] | None = None,
        pad: int = 0,
        batch_size: int = 64,
        **settings: Any,
    ) -> list[list[int]]:
        """Greedy continuations (sampled with `do_sample=True`), cut before the end token; prompts are padded on the left.

        Greedy answers are written `STAGE` tokens at a time, and what has ended by then is no longer carried along: the others
        go on from their own words, in fewer and fuller batches. settings: of transformers' `generate`.
        """
        ends = [] if end is None else [end] if isinstance(end, int) else list(end)
        found: list[list[int]] = [[] for _ in prompts]
        open_, stage = list(range(len(prompts))), max_new_tokens if settings or not ends else STAGE
        with evaluating(model):
            for done in range(0, max_new_tokens, max(stage, 1)):
                size = min(stage, max_new_tokens - done)
                texts = [[*prompts[i], *found[i]] for i in open_]
                written = self._written(model, texts, size, ends, pad, batch_size, settings)
                going = []
                for i, tokens in zip(open_, written, strict=True):
                    stop = next((t for t, token in enumerate(tokens) if token in ends), None)
                    found[i] += tokens[:stop]
                    if stop is None:
                        going.append(i)
                open_ = going
                if not open_:
                    break
        return found

    @staticmethod
    def _written(
        model: nn.Module, texts: Sequence[Sequence[int]], new: int, ends: list[int], pad: int, batch_size: int,
        settings: dict[str, Any],
    ) -> list[list[int]]:  # fmt: skip
        """What the model writes after each text, `new` tokens or up to an end and padding; texts of like length together."""
        place = next(model.parameters()).device
        found: list[list[int]] = [[] for _ in texts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(len(texts[i]) for i in rows)
            ids = torch.tensor([[pad] * (longest - len(texts[i])) + list(texts[i]) for i in rows], device=place)
            mask = torch.tensor([[0] * (longest - len(texts[i])) + [1] * len(texts[i]) for i in rows], device=place)
            made = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, max_new_tokens=new, pad_token_id=pad, eos_token_id=ends or None,
                **({"do_sample": False} | settings),
            )[:, longest:]  # fmt: skip
            for i, tokens in zip(rows, made.tolist(), strict=True):
                found[i] = tokens
        return found

    # -- measuring -------------------------------------------------------------------------------------------------
    def statistics(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """(B, L) each: `log_p`, `mean`, `spread` (see `token_statistics`), `hit`, and `filled`, which are real."""
        table = self.per_choice(token_statistics, output, batch, reduce="none")
        return dict(zip(("log_p", "mean", "spread", "hit"), table.unbind(-1), strict=True)) | {
            "filled": self.answers_at(batch) != NO_ANSWER
        }

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Measurements:
        """probability: mean of exp(-loss), the length-normalised probability; exact_memorisation: share of an answer's
        tokens that are the likeliest; loss: mean over examples, nats per token."""
        totals = {"probability": 0.0, "exact_memorisation": 0.0, "loss": 0.0}
        count = 0
        with evaluating(model):
            for batch in batches:
                batch = move_to_model(batch, model)
                own = self.signals(self.forward(model, batch), batch)
                totals["probability"] += float(own["probability"].sum())
                totals["exact_memorisation"] += float(own["correctness"].sum())
                totals["loss"] -= float(own["loss"].sum())
                count += len(batch)
        return {name: value / count if count else float("nan") for name, value in totals.items()} | {"n": count}

    def forget_score(self, output: Output, batch: Batch) -> PerExample:
        """exp(-mean negative log-likelihood per token): the length-normalised probability of the answer."""
        return (-self.loss(output, batch)).exp()

    def signals(self, output: Output, batch: Batch) -> dict[str, PerExample]:
        """Membership scores from one forward pass, higher = more likely a member (attacks card, section 1).

        loss: mean log p. probability: its exponent. margin: log odds of that. correctness: share of likeliest tokens.
        min_k_20, min_k_40: mean of the lowest 20 / 40% log p. min_k_pp_20, min_k_pp_40: the same of (log p - mean) /
        spread. zlib: mean log p over the compressed bytes of the text, where the data has `zlib_bytes`.
        """
        return self._signals(self.statistics(output, batch), batch)

    @staticmethod
    def _signals(table: dict[str, Tensor], batch: Batch) -> dict[str, PerExample]:
        found = {name: value.double() if name != "filled" else value for name, value in table.items()}
        filled, count = found["filled"], found["filled"].sum(1).clamp_min(1).double()
        loss = found["log_p"].sum(1) / count
        chance = loss.exp()
        normal = (found["log_p"] - found["mean"]) / found["spread"].clamp_min(SMALLEST_VARIANCE**0.5)
        scores = {
            "loss": loss,
            "probability": chance,
            "margin": loss - torch.log1p(-chance.clamp(max=1 - 1e-12)),
            "correctness": found["hit"].sum(1) / count,
        }
        for share in (20, 40):
            scores[f"min_k_{share}"] = lowest_mean(found["log_p"], filled, share / 100)
            scores[f"min_k_pp_{share}"] = lowest_mean(normal, filled, share / 100)
        if "zlib_bytes" in batch.columns:
            scores["zlib"] = loss / batch["zlib_bytes"].to(loss).clamp_min(1)
        return scores

    def readings(self, output: Output, batch: Batch) -> Readings:
        table = self.statistics(output, batch)
        found = self._signals(table, batch)
        return Readings(found, found["probability"], -found["loss"], table)

    # -- checks ----------------------------------------------------------------------------------------------------
    def constants(self, model: nn.Module, data: Any) -> dict[str, Any]:
        """`_vocabulary`: V, for random answers."""
        table = getattr(model, "get_input_embeddings", lambda: None)()
        return {"_vocabulary": int(table.weight.shape[0])} if table is not None else {}

    def problems(self, model: nn.Module, batch: Batch) -> list[str]:
        missing = [name for name in ("input_ids", "attention_mask", self.labels) if name not in batch.columns]
        if missing:
            have = ", ".join(sorted(k for k in batch.columns if not k.startswith("_")))
            return [
                f"expected the columns input_ids, attention_mask and labels, found {have}; make the data with "
                "expunge.question_answer(tokenizer, questions, answers) or expunge.plain_text(tokenizer, texts)"
            ]
        empty = batch.ids[self.choices(batch) == 0].tolist()
        if empty:
            return [f"expected every row to have an answer, found none in rows {empty[:5]}; drop these rows"]
        table = getattr(model, "get_input_embeddings", lambda: None)()
        largest = int(batch["input_ids"].max())
        if table is not None and largest >= table.weight.shape[0]:
            return [
                f"expected token ids below the model's vocabulary of {table.weight.shape[0]}, found {largest}; the tokenizer is "
                "not the model's own: load both from one folder"
            ]
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if context is not None and batch["input_ids"].shape[1] > context:
            return [
                f"expected rows of at most {context} tokens, the model's context, found {batch['input_ids'].shape[1]}; cut them "
                f"with question_answer(..., max_length={context}) or plain_text(..., window={context})"
            ]
        with evaluating(model):
            try:
                logits = self.forward(model, move_to_model(batch, model)).prediction
            except Exception as error:
                return [
                    f"expected the model to run on token ids of shape {tuple(batch['input_ids'].shape)}, found "
                    f"{type(error).__name__}: {error}; pass a causal language model (AutoModelForCausalLM)"
                ]
        if logits.dim() != 3:
            return [
                f"expected the model to return logits (B, T, V), found shape {tuple(logits.shape)}; return all positions"
            ]
        return []


# -- tokens ------------------------------------------------------------------------------------------------------------
def answer_index(labels: Tensor) -> Tensor:
    """(B, T) labels -> (B, L) the positions that predict an answer's token, left-aligned; beyond an example's own, others."""
    wanted = labels[:, 1:] != NO_ANSWER
    longest = max(int(wanted.sum(1).max()), 1) if wanted.numel() else 1
    return torch.argsort((~wanted).to(torch.int8), dim=1, stable=True)[:, :longest]


def _filled(labels: Tensor, where: Tensor) -> Tensor:
    return (labels[:, 1:] != NO_ANSWER).gather(1, where)


def padded(rows: Sequence[Sequence[int]], starts: Sequence[int], like: Batch | int = 0) -> dict[str, Tensor]:
    """Token rows as input_ids, attention_mask and labels, padded on the right; starts: where each row's answer begins.

    like: the padding token, or a batch whose padding token and device are taken."""
    pad = like if isinstance(like, int) else int(like.columns.get("_pad", 0))
    place = None if isinstance(like, int) else like["input_ids"].device
    longest = max(map(len, rows), default=1)
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), NO_ANSWER)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens = torch.tensor(row, dtype=torch.int64)
        ids[i, : len(row)], mask[i, : len(row)], labels[i, start : len(row)] = tokens, 1, tokens[start:]
    return {"input_ids": ids.to(place), "attention_mask": mask.to(place), "labels": labels.to(place)}


def lowest_mean(values: Tensor, filled: Tensor, share: float) -> Tensor:
    """(B,) mean of the max(1, floor(share * n_i)) lowest of each row's real values: Min-K%."""
    ordered = values.masked_fill(~filled, float("inf")).sort(1).values
    kept = (share * filled.sum(1) + 1e-9).floor().clamp_min(1)
    taken = torch.arange(ordered.shape[1], device=ordered.device)[None] < kept[:, None]
    return ordered.masked_fill(~taken, 0.0).sum(1) / kept.to(ordered.dtype)


# -- models ------------------------------------------------------------------------------------------------------------
def logits_at(model: nn.Module, batch: Batch, where: Tensor) -> Tensor:
    """(B, L, V) the model's logits at positions `where` (B, L).

    The positions are picked before the output head, so that a prompt's logits are never computed; whatever the model does to
    logits after its head (soft caps, scales) is done by the model itself.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return _at(_logits(_run(model, batch)), where)
    with _picking(head, where, batch["input_ids"].shape):
        return _logits(_run(model, batch))


def _run(model: nn.Module, batch: Batch) -> Any:
    keywords: dict[str, Any] = {"attention_mask": batch["attention_mask"]} if _accepts(model, "attention_mask") else {}
    if _accepts(model, "use_cache"):
        keywords["use_cache"] = False
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        return model(batch["input_ids"], **keywords)  # a plain module names its argument as it likes
    return model(input_ids=batch["input_ids"], **keywords)


def _logits(result: Any) -> Tensor:
    found = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    found = result[0] if found is None and isinstance(result, (tuple, list)) else found
    if not isinstance(found, Tensor):
        raise TypeError(f"expected the model to return logits, found {type(result).__name__}")
    return found


def _at(states: Tensor, where: Tensor) -> Tensor:
    return states.gather(1, where[..., None].expand(*where.shape, states.shape[-1]))


@contextmanager
def _picking(head: nn.Module, where: Tensor, shape: torch.Size):
    """The head sees only the states (B, T, d) at `where`."""

    def pick(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states = inputs[0]
        return (_at(states, where), *inputs[1:]) if states.shape[:2] == shape else inputs

    hook = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()


def _accepts(model: nn.Module, keyword: str) -> bool:
    base = getattr(model, "base_model", None) if type(model).__module__.startswith("peft") else None
    inner: nn.Module = getattr(base, "model", model) if base is not None else model
    return _parameters(type(inner).forward, keyword)


@lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any], keyword: str) -> bool:
    parameters = inspect.signature(function).parameters
    return keyword in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
