"""Observed intention: removed, or only suppressed? A method's claim beside what was measured.

(Ren et al., "SoK: Machine Unlearning for Large Language Models", arXiv 2506.09227: methods that mean to remove often only
suppress. The rule and its margins are ours, from the sok card.) Removal is observed only if all of these hold against the
retrained model, each with a margin of 0.05 or the distance of two retrained seeds under the same attack, the larger one:

    membership      |AUC(U) - AUC(R)|
    relearning      the score after relearning
    quantisation    the forget score at 8 and at 4 bits
    internal        probe and lens
    prompts         the worst of the prompt attacks that were run
    not reversible  nothing to take off that brings the original back

Otherwise suppression is observed; nothing, where the model still answers as it is. The case is open where a criterion was not
measured and none failed, or where the original is no further from the retrained model than the margin. Passing all of it is a
failure to reject: "not distinguishable from retraining by these tests".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from expunge.audits.attacks.budget import Attacked, Budget, Memory, attacked
from expunge.audits.attacks.excess import MARGIN
from expunge.audits.attacks.membership import auc
from expunge.audits.attacks.unwrapping import Unwrapping
from expunge.audits.battery import default_attacks

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

Observed = Literal["removal", "suppression", "none", "undetermined"]
CRITERIA = ("membership", "relearning", "quantisation", "internal", "prompts", "reversible")
KINDS: dict[str, tuple[str, ...]] = {
    "relearning": ("benign_relearning", "relearning", "retraining_on_parts"),
    "quantisation": ("quantisation_",),
    "internal": ("linear_probe", "prompt_probe", "logit_lens", "head_projection", "direction_ablation"),
    "prompts": ("prompt_templates", "soft_prompt", "gcg"),
}
"""Criterion -> how the names of its attacks begin."""
PROMPTED = ("language",)
"""Kinds of model that are asked in words; others have no prompt criterion."""


@dataclass(frozen=True)
class Criterion:
    """value: unlearned minus retrained (absolute for membership), None where not measured. limit: its margin."""

    name: str
    value: float | None
    limit: float
    source: str

    @property
    def held(self) -> bool | None:
        return None if self.value is None else self.value <= self.limit


@dataclass(frozen=True)
class ObservedIntention:
    """declared: what the method claims. observed: what the measurements say. criteria: each of them."""

    declared: str
    observed: Observed
    criteria: tuple[Criterion, ...]

    def __str__(self) -> str:
        failed = [c for c in self.criteria if c.held is False]
        if self.observed == "removal":
            return f"claims {self.declared}, measured removal: not distinguishable from retraining by these tests"
        if self.observed == "undetermined":
            open_ = ", ".join(c.name for c in self.criteria if c.held is None)
            return f"claims {self.declared}, measured nothing against it, but not measured: {open_}"
        told = "; ".join(f"{c.source} {c.value:+.3f} over a margin of {c.limit:.3f}" for c in failed)
        if self.observed == "none":
            return f"claims {self.declared}, measured none: the forget set is still answered ({told})"
        return f"claims {self.declared}, measured suppression: {told}"

    def as_dict(self) -> dict[str, object]:
        rows = [
            {"name": c.name, "value": c.value, "limit": c.limit, "held": c.held, "source": c.source}
            for c in self.criteria
        ]
        return {"declared": self.declared, "observed": self.observed, "criteria": rows, "sentence": str(self)}


def observed_intention(
    subjects: Subjects,
    declared: str = "removal",
    attacks: Mapping[str, Attacked] | None = None,
    reversible: bool | None = None,
    budget: Budget = Budget(),  # noqa: B008
    margin: float = MARGIN,
    signal: str = "margin",
    memory: Memory | None = None,
) -> ObservedIntention:
    """attacks: name -> what was measured; default: the battery of the kind, run here (or read, where it ran before).

    reversible: whether taking a component off restores the original; default: whether there is a model inside.
    """
    if attacks is None:
        run = [a for a in default_attacks(subjects.task.name) if a.skipped(subjects) is None]
        attacks = {a.name: attacked(subjects, a, budget, memory) for a in run}
    plain = _plain(subjects, margin)
    criteria = [_membership(subjects, margin, signal)]
    criteria += [
        _worst(name, {a: found for a, found in attacks.items() if a.startswith(starts)}, margin)
        for name, starts in KINDS.items()
        if name != "prompts" or subjects.task.name in PROMPTED
    ]
    if reversible is None:
        reversible = Unwrapping().skipped(subjects) is None
    criteria.append(Criterion("reversible", float(reversible), 0.5, "a model inside that can be taken out"))
    known = subjects.forget_scores("original").mean() - subjects.forget_scores("retrained").mean()
    if known <= margin:  # the original would pass as well, so passing says nothing of the method
        criteria.append(
            Criterion("what there was to forget", None, margin, "the original is as near to the retrained model")
        )
    held = [c.held for c in criteria]
    if plain.held is False:
        return ObservedIntention(declared, "none", (plain, *criteria))
    observed: Observed = "suppression" if False in held else "undetermined" if None in held else "removal"
    return ObservedIntention(declared, observed, tuple(criteria))


def _plain(subjects: Subjects, margin: float) -> Criterion:
    """The untouched model is not suppressed: it answers. Half way between retrained and original counts as answering."""
    o, u, r = (float(subjects.forget_scores(s).mean()) for s in ("original", "unlearned", "retrained"))
    return Criterion("unattacked", u - r, max(margin, (o - r) / 2), "forget score as it is")


def _membership(subjects: Subjects, margin: float, signal: str) -> Criterion:
    if subjects.unmet("holdout") is not None:
        return Criterion("membership", None, margin, "no holdout")

    def area(subject: str) -> float:
        return auc(*(subjects.signal(subject, split, signal) for split in ("forget", "holdout")))

    apart = abs(area("floor") - area("retrained")) if "floor" in subjects.compared else 0.0
    return Criterion("membership", abs(area("unlearned") - area("retrained")), max(margin, apart), f"AUC of {signal}")


def _worst(name: str, found: Mapping[str, Attacked], margin: float) -> Criterion:
    if not found:
        return Criterion(name, None, margin, "no such attack was run")
    rows = {}
    for attack, scores in found.items():
        apart = 0.0 if scores.second is None else abs(float(np.mean(scores.second) - np.mean(scores.retrained)))
        rows[attack] = (float(np.mean(scores.unlearned) - np.mean(scores.retrained)), max(margin, apart))
    worst = max(rows, key=lambda attack: rows[attack][0] - rows[attack][1])
    return Criterion(name, *rows[worst], worst)
