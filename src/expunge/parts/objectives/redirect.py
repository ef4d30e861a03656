"""Answer one condition as another: the forget losses of generative models that are told what to draw.

All of them compare two predictions at the same x_t. With o(c) the network under training, o0(c) the original, "" no condition:

    redirect("next")             D( o(c), o(c') )                          SalUn; c' from a rule; the target is not differentiated
    negated("forget", eta)       D( o(c), o0("") - eta (o0(c) - o0("")) )  ESD's negative guidance

The x_t is the forget image's, or comes from `partial`: sampling from noise that stops on the way, which needs no images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import BadSetting
from expunge.parts.objectives.base import Objective
from expunge.parts.objectives.wrapped import Wrapped
from expunge.parts.step import Step
from expunge.tasks.base import Batch, Output, PerExample
from expunge.tasks.sampling import Sampling, partial

CURRENT = "current"
"""The network under training itself, as it is now, not differentiated."""
OWN = "own"
"""The rule for a row's own condition."""
LATENTS = ("data", "student", "original")


@contextmanager
def first_token_still(model: nn.Module) -> Iterator[None]:
    """Within it no gradient goes through the first text position's keys and values of cross-attention."""

    def still(_module: nn.Module, _inputs: Any, result: Tensor) -> Tensor:
        return torch.cat([result[:, :1].detach(), result[:, 1:]], 1)

    inside = [m for name, m in model.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    handles = [module.register_forward_hook(still) for module in inside]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def says(step: Step, reference: str, batch: Batch) -> Output:
    """What a reference (or the network itself, as it is now) says about a batch, without gradient. An adversary's words before the
    prompt are for the network under training alone."""
    if batch.columns.get("prefix") is not None:
        batch = batch.with_columns(prefix=None)
    if reference != CURRENT:
        return step.references.fresh(reference, batch)
    with torch.no_grad():
        return step.forward(batch)


@dataclass(frozen=True)
class Partial:
    """Where x_t comes from when it is not a data row's: sampling that stops at a step drawn uniformly, the same for the batch.

    by: `student` (the network under training, ESD's first code) or `original` (its second): it changes ESD's strength.
    condition: a rule for what the sampling is told; None: each row's own.
    """

    by: str = "student"
    sampling: Sampling = Sampling(steps=25, guidance=3.0)
    condition: str | None = None

    def __call__(self, step: Step) -> Batch:
        """The step's batch with `noisy` and `timestep` from a partial sampling."""
        task: Any = step.task
        batch = step.batch if self.condition is None else task.conditioned(step.model, step.batch, self.condition)
        stop_at = int(torch.randint(0, self.sampling.steps, (1,), generator=step.rng))
        if self.by == "student":
            modes = [(m, m.training) for m in step.model.modules()]
            step.model.eval()
            noisy, timestep = partial(step.model, task.condition(batch), self.sampling, stop_at, step.rng)
            for module, training in modes:
                module.training = training
        else:
            with step.references.running(self.by) as model:
                noisy, timestep = partial(model, task.condition(batch), self.sampling, stop_at, step.rng)
        return step.batch.with_columns(noisy=noisy, timestep=timestep.long())


def latents_of(kind: str, sampling: Sampling | None = None) -> Partial | None:
    """`data`: the row's own noised image (None); `student` or `original`: partial sampling by that network."""
    if kind not in LATENTS:
        raise BadSetting(f"expected latents from {', '.join(LATENTS)}, found {kind!r}; choose one")
    return None if kind == "data" else Partial(kind, sampling or Sampling(steps=25, guidance=3.0))


@dataclass(frozen=True)
class Redirect(Objective):
    rule: str
    reference: str = CURRENT
    latents: Partial | None = None
    source: str | None = None
    drop: float = 0.0
    still_first: bool = False

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        from_original = self.latents is not None and self.latents.by == "original"
        names = {self.reference} - {CURRENT} | ({"original"} if from_original else set())
        return tuple((name, "output") for name in sorted(names))

    def __call__(self, step: Step) -> PerExample:
        task: Any = step.task
        asked = step.batch if self.latents is None else self.latents(step)
        other = asked if self.rule == OWN else task.conditioned(step.model, asked, self.rule)
        if self.source is not None:
            asked = task.conditioned(step.model, asked, self.source)
        told = dropped(step, asked, self.drop)
        with first_token_still(step.model) if self.still_first else nullcontext():
            own = step.output if told is step.batch and not self.still_first else step.forward(told)
        return task.divergence(own, says(step, self.reference, dropped(step, other, self.drop)), asked)

    def __str__(self) -> str:
        who = "model" if self.reference == CURRENT else self.reference
        return f"D({who}({self.rule})‖model{'' if self.source is None else f'({self.source})'})"


@dataclass(frozen=True)
class Negated(Objective):
    eta: float = 1.0
    concept: str | None = None
    source: str | None = None
    latents: Partial | None = Partial()

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return (("original", "output"),)

    def __call__(self, step: Step) -> PerExample:
        task: Any = step.task
        asked = step.batch if self.latents is None else self.latents(step)
        about = asked if self.concept is None else task.conditioned(step.model, asked, self.concept)
        base = about if self.source is None else task.conditioned(step.model, asked, self.source)
        own = step.output if base is step.batch else step.forward(base)
        said = says(step, "original", about)
        free = says(step, "original", task.conditioned(step.model, asked, "null"))
        start = free if self.source is None else says(step, "original", base)
        target = start.prediction - self.eta * (said.prediction - free.prediction)
        return task.divergence(own, Output(target), asked)

    def __str__(self) -> str:
        return f"D(original('') - {self.eta:g}·(original(c) - original(''))‖model(c))"


@dataclass(frozen=True)
class GuidedError(Objective):
    scale: float = 3.0

    def __call__(self, step: Step) -> PerExample:
        task: Any = step.task
        free = step.forward(task.conditioned(step.model, step.batch, "null"))
        told = step.output.prediction
        guided = free.prediction + self.scale * (told - free.prediction)
        return task.loss(Output(guided, step.output.extra), step.batch)

    def __str__(self) -> str:
        return f"loss of guidance({self.scale:g})"


@dataclass(frozen=True)
class Unconditioned(Wrapped):
    share: float = 0.1

    def __call__(self, step: Step) -> PerExample:
        inner = step.again()
        inner.batch, inner.scratch = dropped(step, step.batch, self.share), {"memory": step.scratch.get("memory")}
        return self.inner(inner)

    def __str__(self) -> str:
        return f"{self.inner} (condition dropped at {self.share:g})"


def dropped(step: Step, batch: Batch, share: float) -> Batch:
    """The batch with each row's condition replaced by none with probability `share`, drawn from the step's rng."""
    if share == 0:
        return batch
    task: Any = step.task
    own = task.condition(batch)
    none = task.condition(task.conditioned(step.model, batch, "null"))
    gone = (torch.rand(len(own), generator=step.rng) < share).to(own.device).reshape(-1, *[1] * (own.dim() - 1))
    return task.with_condition(batch, torch.where(gone, none, own))


def guided_error(scale: float = 3.0) -> Objective:
    """The denoising loss of the guided prediction o("") + scale (o(c) - o("")): what SalUn's mask for generation ranks by.
    scale in diffusers' convention (1 + w)."""
    return GuidedError(scale)


def unconditioned(share: float, inner: Objective) -> Objective:
    """An objective under label dropping: a row's condition is none with probability `share`, as in classifier-free training."""
    return Unconditioned(inner, share) if share else inner


def redirect(
    rule: str, reference: str = CURRENT, latents: Partial | None = None, source: str | None = None, drop: float = 0.0,
    still_first: bool = False,
) -> Objective:  # fmt: skip
    """Draw what another condition draws: mean squared difference of the two predictions at the same x_t.

    rule: the condition that stands in (see `tasks.conditions`): "next", "3", "red -> plain", "a painting", "null"; or "own", the
        row's own, with a `source` that is answered instead.
    reference: who says what that is: the network itself as it is now ("current": SalUn, Concept Ablation), or "original".
    source: a rule for the condition that is answered; None: each row's own.
    drop: probability with which either side's condition is none, drawn independently.
    still_first: no gradient through the first text position's keys and values (Concept Ablation).
    """
    return Redirect(rule, reference, latents, source, drop, still_first)


def negated(
    eta: float = 1.0, concept: str | None = None, source: str | None = None, latents: Partial | None = Partial()
) -> Objective:
    """ESD (Gandikota et al. 2023, eq. 6): the original's prediction guided away from the concept becomes the prediction.

    eta: strength of the negative guidance. concept: a rule for the concept's condition; None: each row's own.
    source: erase it from this condition (attribute erasure: o0(source) - eta (o0(c) - o0(""))); None: from the concept itself.
    latents: where x_t comes from; None: the rows' own noised images.
    """
    return Negated(eta, concept, source, latents)
