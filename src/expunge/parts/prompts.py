"""Prompts as variables: words chosen by gradient, and the adversary that puts word embeddings before a prompt.

A discrete prompt is a row of weights over the vocabulary for each of its words. Forward it is one word (one-hot), backward the
gradient of that one-hot, clamped, goes to the weights; after each step they are projected back onto the simplex
(Zhang et al., ECCV 2024, 2310.11868).

    v* = argmin ||v - u||_2   with v >= 0, sum v = 1:   v = max(u - mu, 0),  mu from the sorted u (Duchi et al., ICML 2008)

The adversary in prompt space (AdvUnlearn, Zhang et al., NeurIPS 2024, 2405.15234) moves k word embeddings d behind the start token,
by Adam from the embeddings of random words, to minimise its own goal; the attacked terms then see the prompt with them before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import BadSetting, UnmetNeed
from expunge.parts.adversaries import Adversary
from expunge.seeds import generator
from expunge.tasks.base import held_still

if TYPE_CHECKING:
    from expunge.parts.plan import Term
    from expunge.parts.step import Step


def to_simplex(rows: Tensor) -> Tensor:
    """The nearest point of the probability simplex to each row (..., V), exactly, by sorting."""
    ordered = rows.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    place = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    kept = (ordered * place > excess).sum(-1, keepdim=True)
    return (rows - excess.gather(-1, kept - 1) / kept).clamp_min(0)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, weights: Tensor, chosen: Tensor) -> Tensor:
        return F.one_hot(chosen, weights.shape[-1]).to(weights.dtype)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return F.hardtanh(gradient), None


def straight_through(weights: Tensor, chosen: Tensor) -> Tensor:
    """One-hot (..., V) of the chosen words (...); backward, the upstream gradient clamped to [-1, 1] reaches the weights (..., V)."""
    return _StraightThrough.apply(weights, chosen)


def drawn_words(weights: Tensor, rng: torch.Generator) -> Tensor:
    """(...) a word from each row (..., V) of weights, drawn on the CPU."""
    flat = weights.detach().reshape(-1, weights.shape[-1]).cpu()
    return torch.multinomial(flat, 1, generator=rng).reshape(weights.shape[:-1]).to(weights.device)


def word_table(model: Any) -> nn.Embedding:
    """The word embeddings (V, d) of a text-conditional denoiser."""
    encoder = getattr(model, "text_encoder", None)
    if encoder is None:
        raise UnmetNeed(
            "expected a text-conditional model, whose prompts can be attacked, found one without a text encoder; use an adversary "
            "on weights or latents"
        )
    return encoder.get_input_embeddings()


@contextmanager
def rows_added(table: nn.Embedding, vectors: Tensor) -> Iterator[None]:
    """Inside, id V + j means row j of vectors (m, d), V the size of the table; gradients reach the vectors."""
    size = table.weight.shape[0]
    asked: list[Tensor] = []

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        asked[:] = [inputs[0]]
        return (inputs[0].clamp(max=size - 1), *inputs[1:])

    def after(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        ids = asked[0]
        own = vectors.to(output.dtype)[(ids - size).clamp(min=0)]
        return torch.where((ids >= size)[..., None], own, output)

    hooks = [table.register_forward_pre_hook(before), table.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {"l2": Tensor.square, "l1": Tensor.abs}


def predictions(model: Any, clean: Tensor, noise: Tensor, timesteps: Tensor, encoded: Tensor) -> Tensor:
    """(n, m, C, H, W) what the model says of n images under one condition each, at m timesteps each, in one pass.

    clean (n, C, H, W), noise (n, m, C, H, W), timesteps (m,) or (n, m), encoded: what `model.encode` gave for n conditions.
    """
    n, m = noise.shape[:2]
    at = timesteps.expand(n, m).reshape(-1).to(clean.device)
    noisy = model.noised(clean.repeat_interleave(m, 0), noise.flatten(0, 1), at)
    return model(noisy, at, encoded.repeat_interleave(m, 0)).float().view(noise.shape)


def denoising_errors(
    model: Any, clean: Tensor, noise: Tensor, timesteps: Tensor, encoded: Tensor, criterion: str = "l2",
    aim: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(n, m) errors of `predictions` against what the network was trained to say, or against an `aim` (n, m, C, H, W).

    The diffusion classifier's evidence (Li et al., ICCV 2023, 2303.16203): the lower, the better a condition explains the image.
    """
    if aim is None:
        n, m = noise.shape[:2]
        at = timesteps.expand(n, m).reshape(-1).to(clean.device)
        aim = model.target(clean.repeat_interleave(m, 0), noise.flatten(0, 1), at).view(noise.shape)
    return CRITERIA[criterion](predictions(model, clean, noise, timesteps, encoded) - aim).flatten(2).mean(2)


@dataclass(frozen=True)
class PromptAttack(Adversary):
    """See the module's text and `prompt`."""

    goal: tuple[Term, ...]
    tokens: int = 1
    steps: int = 30
    lr: float = 1e-3
    start: float = 0.0
    accumulate: bool = True
    fast: bool = False
    on: str = "forget"
    space = "prompt"

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.steps < 0 or not self.lr > 0 or not 0 <= self.start <= 1:
            raise BadSetting(
                f"expected tokens >= 1, steps >= 0, lr > 0 and a start between 0 and 1 (a share of all updates), found "
                f"{self.tokens}, {self.steps}, {self.lr} and {self.start}; correct them"
            )
        astray = [str(term) for term in self.goal if term.on != self.on]
        if astray or not self.goal:
            raise BadSetting(
                f"expected a goal with terms on '{self.on}', found {', '.join(astray) or 'none'}; say what it minimises"
            )

    def attack(self, step: Step, harm: Callable[[Step], Tensor]) -> Step:
        if self.steps == 0 or step.progress < self.start:
            return step
        hard = prefixed(step, self.found(step, harm))
        hard.clean = step
        return hard

    def found(self, step: Step, harm: Callable[[Step], Tensor]) -> Tensor:
        """(B, k, d) word embeddings, each row's own; every step draws x_t anew."""
        table = word_table(step.model).weight.detach()
        # of a stream of its own: the terms draw what they would draw without an attack
        seed = int(torch.randint(2**62, (1,), generator=step.again().rng))
        words = torch.randint(len(table), (len(step.batch), self.tokens), generator=generator(seed, "words"))
        delta = table[words.to(table.device)].clone().requires_grad_(True)
        mover, total = torch.optim.Adam([delta], lr=self.lr), torch.zeros_like(delta)
        with held_still(step.model), torch.enable_grad():
            for number in range(self.steps):
                trial = prefixed(step, delta)
                trial.rng = generator(seed, "prompt attack", number)
                (gradient,) = torch.autograd.grad(-harm(trial), delta)
                total = total + gradient if self.accumulate else gradient
                total = total.sign() if self.fast else total
                delta.grad = total.clone()
                mover.step()
        return delta.detach()

    def __str__(self) -> str:
        how = [f"{self.tokens} word{'s' if self.tokens > 1 else ''}", f"{self.steps}"]
        how += ["sign"] if self.fast else []
        how += [f"from {self.start:g}"] if self.start else []
        return f"prompt({', '.join(how)}; {' + '.join(map(str, self.goal))})"


def prefixed(step: Step, words: Tensor) -> Step:
    """The step with word embeddings (B, k, d) before its prompts, and its draws to come."""
    hard = step.again()
    hard.batch = step.batch.with_columns(prefix=words)
    return hard


def prompt(
    *goal: Term, tokens: int = 1, steps: int = 30, lr: float = 1e-3, start: float = 0.0, accumulate: bool = True,
    fast: bool = False, on: str = "forget",
) -> PromptAttack:  # fmt: skip
    """Worst-case words before the prompts of `on`, for `Plan(adversary=...)`.

    goal: terms it minimises. tokens: k words. steps, lr: of its Adam. start: share of all updates before which it rests.
    accumulate: gradients add up over its steps (as in AdvUnlearn's code, where they are never set to zero). fast: their sign.
    """
    return PromptAttack(goal, tokens, steps, lr, start, accumulate, fast, on)
