"""Causal tracing: which blocks carry a fact, and a scope of those.

Meng et al., ROME, 2202.05262, as SHA256 (2504.12996) uses it. A fact is a prompt with a marked subject and the first token o
of its answer. In one batch of a clean run and `copies` corrupted ones, Gaussian noise (std 3 x that of the embeddings of
all subjects) is added to the subject's embeddings; then the clean output of a module at a position is put back into the
corrupted runs:

    effect(t, l) = mean over copies of p(o | corrupted, restored at t, l)       indirect effect = effect - p(o | corrupted)

Parts of a block (mlp, attention) are restored in a window of blocks around l, whole blocks one by one. The noise is drawn
once per fact, the same for all its restorations. Facts that the model does not predict are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import BadSetting, UnmetNeed
from expunge.parts.blocks import block_parts
from expunge.parts.scopes.base import Mask, Scope
from expunge.seeds import generator
from expunge.tasks.base import evaluating


@dataclass(frozen=True)
class Fact:
    """prompt: tokens. answer: the token expected next. subject: (start, end) positions in the prompt, end exclusive."""

    prompt: tuple[int, ...]
    answer: int
    subject: tuple[int, int]


@dataclass(frozen=True)
class Traced:
    """clean, corrupted: p(o) without noise, and with. effect: (positions, blocks). positions: of the prompt."""

    clean: float
    corrupted: float
    effect: Tensor
    positions: tuple[int, ...]

    @property
    def indirect(self) -> Tensor:
        """(positions, blocks) what restoring brings back."""
        return self.effect - self.corrupted


def default_window(blocks: int) -> int:
    """A third of the blocks, at most the 10 of the papers, whose models have 16 to 48."""
    return min(10, max(1, blocks // 3))


def window_around(block: int, width: int, blocks: int) -> range:
    """block - width//2 ... block + (width-1)//2, clipped: for 10 that is l-5 to l+4."""
    return range(max(0, block - width // 2), min(blocks, block + (width - 1) // 2 + 1))


def subject_deviation(model: nn.Module, facts: Iterable[Fact]) -> float:
    """Standard deviation of all numbers in the embeddings of all subjects."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    tokens = [token for fact in facts for token in fact.prompt[slice(*fact.subject)]]
    with torch.no_grad():
        return float(table(torch.tensor(tokens, device=table.weight.device)).float().std())


@contextmanager
def _tampered(model: nn.Module, noise: Tensor, at: slice, restored: Sequence[tuple[str, Sequence[int]]]):
    """Rows 1.. get noise on their embeddings; the named modules' outputs at these positions are those of row 0."""

    def corrupt(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, at] += noise.to(output)
        return output

    def restore(positions: Sequence[int]):
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            first = first.clone()
            first[1:, list(positions)] = first[:1, list(positions)]
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    hooks = [model.get_input_embeddings().register_forward_hook(corrupt)]  # type: ignore[operator]
    hooks += [model.get_submodule(name).register_forward_hook(restore(where)) for name, where in restored if where]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def chances(model: nn.Module, fact: Fact, noise: Tensor, restored: Sequence[tuple[str, Sequence[int]]] = ()) -> Tensor:
    """(1 + copies,) probability of the answer in the clean run and in each corrupted one. noise: (copies, subject, d)."""
    place = next(model.parameters()).device
    ids = torch.tensor([fact.prompt], device=place).expand(len(noise) + 1, -1)
    with evaluating(model), _tampered(model, noise, slice(*fact.subject), restored):
        logits = model(input_ids=ids).logits[:, -1]
    return logits.float().softmax(-1)[:, fact.answer]


@torch.no_grad()
def predicts(model: nn.Module, fact: Fact) -> bool:
    """Whether the answer's first token is the model's likeliest."""
    with evaluating(model):
        ids = torch.tensor([fact.prompt], device=next(model.parameters()).device)
        return int(model(input_ids=ids).logits[0, -1].argmax()) == fact.answer


def trace(
    model: nn.Module, fact: Fact, deviation: float, *, kind: str = "mlp", window: int | None = None, copies: int = 10,
    positions: Sequence[int] | None = None, rng: torch.Generator | None = None,
) -> Traced:  # fmt: skip
    """The effect of restoring a clean output, position by position and block by block.

    deviation: of the noise. positions: default the subject's last. window: blocks restored together (1 for kind "block").
    """
    names = block_parts(model, kind)
    width = 1 if kind == "block" else default_window(len(names)) if window is None else window
    where = (fact.subject[1] - 1,) if positions is None else tuple(positions)
    size = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    noise = deviation * torch.randn(copies, fact.subject[1] - fact.subject[0], size, generator=rng)
    base = chances(model, fact, noise)
    effect = torch.zeros(len(where), len(names))
    for i, t in enumerate(where):
        for block in range(len(names)):
            restored = [(names[b], (t,)) for b in window_around(block, width, len(names))]
            effect[i, block] = float(chances(model, fact, noise, restored)[1:].mean())
    return Traced(float(base[0]), float(base[1:].mean()), effect, where)


def find_subject(tokenizer: Any, prompt: Sequence[int], text: str) -> tuple[int, int] | None:
    """(start, end) of the tokens that spell a text in a prompt, end exclusive; None if it is not there."""
    ends = [len(tokenizer.decode(list(prompt[:k]))) for k in range(len(prompt) + 1)]
    at = tokenizer.decode(list(prompt)).find(text)
    if at < 0 or not text:
        return None
    start = max(k for k, end in enumerate(ends) if end <= at)
    return start, min(k for k, end in enumerate(ends) if end >= at + len(text))


def facts_of(data: Any, ids: Tensor) -> list[Fact]:
    """Facts of these rows of a `TextData` with a column `subject` (the text of each row's subject); rows whose prompt does
    not have it are left out."""
    if "subject" not in data.names:
        raise UnmetNeed(
            "expected a column 'subject' (the text that names what each question is about) to trace facts, found "
            f"{', '.join(data.names)}; pass question_answer(..., subject=[...]), or name the blocks (layers=...)"
        )
    texts, found = data.column("subject"), []
    for row, prompt, answer in zip(ids.tolist(), data.prompt_ids(ids), data.answer_ids(ids), strict=True):
        span = find_subject(data.tokenizer, prompt, str(texts[row]))
        if span is not None:
            found.append(Fact(tuple(prompt), answer[0], span))
    return found


@dataclass(frozen=True)
class Blocks(Scope):
    """The weights of one part of some blocks. chosen: their numbers; none: those with the largest mean indirect effect at the
    subject's last token, over at most `facts` forget rows."""

    chosen: tuple[int, ...] = ()
    kind: str = "mlp"
    top: int | None = None
    facts: int = 125
    window: int | None = None
    copies: int = 10

    def select(self, workbench: Any) -> Mask:
        model = workbench.model
        names = block_parts(model, self.kind)
        wrong = [i for i in self.chosen if not 0 <= i < len(names)]
        if wrong:
            raise BadSetting(f"expected blocks in 0..{len(names) - 1}, found {wrong}; correct them")
        chosen = self.chosen or self._traced(workbench, len(names))
        workbench.note("blocks", list(chosen))
        prefixes = tuple(f"{names[i]}." for i in chosen)
        return {name: name.startswith(prefixes) for name, _ in model.named_parameters()}

    def _traced(self, workbench: Any, blocks: int) -> tuple[int, ...]:
        """The paper's share of blocks, 6 of 16, unless `top` says how many."""
        rows = workbench.splits["forget"].sample(self.facts, generator(workbench.seed, "trace", "facts"))
        every = facts_of(rows.data, rows.ids)
        facts = [f for f in every if predicts(workbench.model, f)]
        if not facts:
            raise UnmetNeed(
                f"expected facts that the model predicts to trace, found none among {len(every)} whose prompt has its "
                "subject; check the subjects, or name the blocks (layers=...)"
            )
        deviation = 3.0 * subject_deviation(workbench.model, facts)
        effects = []
        for number, fact in enumerate(facts):
            rng = generator(workbench.seed, "trace", number)
            found = trace(
                workbench.model, fact, deviation, kind=self.kind, window=self.window, copies=self.copies, rng=rng
            )
            effects.append(found.indirect[0])
        mean = torch.stack(effects).mean(0)
        workbench.note("indirect_effect", [float(v) for v in mean])
        workbench.note("facts_traced", len(facts))
        count = max(1, round(6 / 16 * blocks)) if self.top is None else min(self.top, blocks)
        return tuple(sorted(mean.argsort(descending=True, stable=True)[:count].tolist()))

    def __str__(self) -> str:
        return f"{self.kind} of blocks {','.join(map(str, self.chosen))}" if self.chosen else f"traced({self.kind})"


def blocks(*numbers: int, kind: str = "mlp") -> Scope:
    """The `kind` ("mlp", "attention", "block") weights of these blocks, counted from 0."""
    if not numbers:
        raise BadSetting("expected numbers of blocks, found none; give some, or use traced() to find them")
    return Blocks(tuple(numbers), kind)


def traced(
    top: int | None = None, kind: str = "mlp", facts: int = 125, window: int | None = None, copies: int = 10
) -> Scope:
    """The `kind` weights of the blocks that carry the forget facts, by causal tracing (default: 6 of 16 blocks)."""
    return Blocks((), kind, top, facts, window, copies)
