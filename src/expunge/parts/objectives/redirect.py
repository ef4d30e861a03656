"""Answer one condition as another: the forget losses of generative models that are told what to draw.

All of them compare two predictions at the same x_t. With o(c) the network under training, o0(c) the original, "" no condition:

    redirect("next")             D( o(c), o(c') )                          SalUn; c' from a rule; the target is not differentiated
    negated("forget", eta)       D( o(c), o0("") - eta (o0(c) - o0("")) )  ESD's negative guidance

The x_t is the forget image's, or comes from `partial`: sampling from noise that stops on the way, which needs no images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from expunge.errors import BadSetting
from expunge.parts.objectives.base import Objective
from expunge.parts.step import Step
from expunge.tasks.base import Batch, Output, PerExample
from expunge.tasks.sampling import Sampling, partial

CURRENT = "current"
"""The network under training itself, as it is now, not differentiated."""
LATENTS = ("data", "student", "original")


def says(step: Step, reference: str, batch: Batch) -> Output:
    """What a reference (or the network itself, as it is now) says about a batch, without gradient."""
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

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        from_original = self.latents is not None and self.latents.by == "original"
        names = {self.reference} - {CURRENT} | ({"original"} if from_original else set())
        return tuple((name, "output") for name in sorted(names))

    def __call__(self, step: Step) -> PerExample:
        task: Any = step.task
        asked = step.batch if self.latents is None else self.latents(step)
        if self.source is not None:
            asked = task.conditioned(step.model, asked, self.source)
        own = step.output if asked is step.batch else step.forward(asked)
        target = says(step, self.reference, task.conditioned(step.model, asked, self.rule))
        return task.divergence(own, target, asked)

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


def redirect(
    rule: str, reference: str = CURRENT, latents: Partial | None = None, source: str | None = None
) -> Objective:
    """Draw what another condition draws: mean squared difference of the two predictions at the same x_t.

    rule: the condition that stands in (see `tasks.conditions`): "next", "3", "red -> plain", "a painting", "null".
    reference: who says what that is: the network itself as it is now ("current": SalUn, Concept Ablation), or "original".
    source: a rule for the condition that is answered; None: each row's own.
    """
    return Redirect(rule, reference, latents, source)


def negated(
    eta: float = 1.0, concept: str | None = None, source: str | None = None, latents: Partial | None = Partial()
) -> Objective:
    """ESD (Gandikota et al. 2023, eq. 6): the original's prediction guided away from the concept becomes the prediction.

    eta: strength of the negative guidance. concept: a rule for the concept's condition; None: each row's own.
    source: erase it from this condition (attribute erasure: o0(source) - eta (o0(c) - o0(""))); None: from the concept itself.
    latents: where x_t comes from; None: the rows' own noised images.
    """
    return Negated(eta, concept, source, latents)
