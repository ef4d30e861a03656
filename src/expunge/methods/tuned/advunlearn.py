"""AdvUnlearn: negative guidance in the text encoder, under the words before the prompt that bring the concept back best.

Paper: "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models", Zhang et al., NeurIPS 2024,
https://arxiv.org/abs/2405.15234, eq. 5.

    upper:  min_theta  || o(z_t, [d, c]) - ( o0(z_t, "") - eta (o0(z_t, c) - o0(z_t, "")) ) ||^2 + gamma || o(z_r, c_r) - o0(z_r, c_r) ||^2
    lower:  d = argmin_d  || o(z_t, [d, c]) - o0(z_t, c) ||^2           by Adam on k word embeddings behind the start token

theta is the text encoder without its embeddings, in which the attack moves; o0 has the original encoder, and z_t is made by it, so
that it shows the concept. No image is read. `attack_steps=0` is ESD in that scope with the retain term.
Departures: t is the sampler's own next timestep (as in `esd`); d starts at random words in every update (the code's `latest` start
would have to outlive a killed run); `iter` keeps Adam moments of its own; k is counted in tokens, not in whitespace words.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.errors import BadData, UnmetNeed
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Lr, Steps, counted
from expunge.methods.tuned.esd import ESD_SCOPES, Concept
from expunge.parts.objectives import negated, redirect
from expunge.parts.objectives.redirect import OWN, Partial
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.prompts import prompt
from expunge.parts.scopes import component, layers
from expunge.parts.scopes.base import Scope
from expunge.tasks.sampling import Sampling


@method(
    family="tuned", needs=("retain",), kinds=("diffusion",), intention="removal", mechanism="negative guidance",
    paper="Zhang et al., NeurIPS 2024, 2405.15234",
)  # fmt: skip
def advunlearn(
    case: Case,
    concept: Concept = None,
    scope: Annotated[
        Literal["text_encoder", "x", "x_strict", "u", "all"], setting("which weights move; all but the first: ESD's")
    ] = "text_encoder",
    first_layers: Annotated[int | None, setting("move only so many first blocks of the text encoder", ge=1)] = None,
    eta: Annotated[float, setting("strength of the negative guidance", gt=0)] = 1.0,
    retain_w: Annotated[float, setting("weight of the retain prompts' distillation, gamma", ge=0)] = 1.0,
    retain: Annotated[Literal["reg", "iter"], setting("added to the loss, or an update of its own after each")] = "reg",
    retain_batch_size: Annotated[int, setting("retain prompts per step", ge=1)] = 5,
    attack_steps: Annotated[int, setting("of the adversary in each update; 0: none", ge=0)] = 30,
    attack_lr: Annotated[float, setting("step size of the adversary", gt=0)] = 1e-3,
    tokens: Annotated[int, setting("word embeddings that the adversary puts before the prompt", ge=1)] = 1,
    warm_up: Annotated[int, setting("updates before the adversary begins", ge=0)] = 200,
    fast: Annotated[bool, setting("the sign of the adversary's gradient")] = False,
    accumulate: Annotated[bool, setting("the adversary's gradients add up, as in the released code")] = True,
    steps: Steps = 1000,
    lr: Lr = 1e-5,
    batch_size: BatchSize = 1,
    sampling_steps: Annotated[int, setting("of the partial sampling", ge=1)] = 50,
    guidance: Annotated[float, setting("of the partial sampling, diffusers' convention", ge=1)] = 3.0,
) -> Plan:
    """Erase the concept from the text encoder, also under the words that would bring it back; reads prompts alone."""
    if case.model.kind != "text":
        raise UnmetNeed(
            f"expected a text-conditional model for advunlearn, found a {case.model.kind}-conditional one; use esd"
        )
    disjoint(case, concept)
    # the network is still the original's where only the encoder moves
    by = "original" if scope == "text_encoder" else "student"
    sampling = Sampling(sampling_steps, guidance)
    asked = Partial(by, sampling, concept)
    move = Optimizer("adam", lr=lr)
    stay = Term(
        redirect(OWN, "original", Partial(by, sampling)), on="retain", weight=retain_w, batch_size=retain_batch_size,
        optimizer=move if retain == "iter" else None,
    )  # fmt: skip
    when = counted(case, steps, batch_size)
    updates = when["epochs"] * max(1, -(-len(case.split("forget")) // batch_size))
    attack = prompt(
        Term(redirect(concept or OWN, "original", asked, source=concept), on="forget"), tokens=tokens, steps=attack_steps,
        lr=attack_lr, start=min(warm_up / updates, 1.0), accumulate=accumulate, fast=fast,
    )  # fmt: skip
    return Plan(
        Term(negated(eta, concept, None, asked), on="forget"), *((stay,) if retain_w else ()),
        scope=encoder_scope(first_layers) if scope == "text_encoder" else component(ESD_SCOPES[scope]),
        adversary=attack if attack_steps else None, optimizer=move, mode="eval", **when,
    )  # fmt: skip


def encoder_scope(first_layers: int | None = None) -> Scope:
    """The text encoder without its embeddings; with `first_layers`, those blocks alone."""
    whole = component("text_encoder")
    if first_layers is None:
        return whole
    return whole & layers(*(f"text_encoder.*layers.{i}.*" for i in range(first_layers)))


def disjoint(case: Case, concept: str | None) -> None:
    """Refuse retain prompts that ask for the concept: their distillation would hold on to what is to go. By tokens."""
    if not len(case.split("forget")):
        return
    conditions = case.model.conditions
    kept, gone = (
        case.task.condition(rows.data.fetch(rows.ids)).unique(dim=0)  # type: ignore[attr-defined]
        for rows in (case.split("retain"), case.split("forget"))
    )
    if concept is None:
        both = {tuple(row) for row in kept.tolist()} & {tuple(row) for row in gone.tolist()}
    else:
        words = [conditions.words(word) for word in concept.split("|")]
        both = {
            tuple(row.tolist())
            for row in kept
            for word in words
            if any(conditions.content(row)[i : i + len(word)] == word for i in range(len(row)))
        }
    if both:
        shown = ", ".join(repr(conditions.text(conditions.content(kept.new_tensor(row)))) for row in sorted(both)[:3])
        raise BadData(
            f"expected retain prompts without the concept, found {len(both)} that hold it ({shown}); put their rows into the "
            "request, or out of the data"
        )
