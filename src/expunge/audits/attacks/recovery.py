"""Recovery curves: how much comes back for how much.

    R(b)        (s_b - s_unl) / (s_orig - s_unl)           share of the lost that a budget b brings back
    steps       the least budget b with s_b >= tau s_orig
    excess      max_b mean_i (s_b,i(U) - s_b,i(R))         over the retrained model under the same budget: the zero line

Budgets are steps of relearning on a tenth of the forget set, scored on the rest (the same batches in the same order, so a
longer run begins as the shorter one). Published steps: 50 to 150 (MUSE, WMDP); a tiny model needs some ten. Cap them: a
retrained model forgets the rest while it learns the few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from expunge.audits.attacks.budget import Attack, Budget, Memory, attacked
from expunge.audits.attacks.excess import Excess, excess
from expunge.audits.attacks.relearning import Relearning, RetrainingOnParts
from expunge.audits.base import Measured, Measurement, check
from expunge.errors import BadSetting

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

STEPS = (1, 2, 5, 10, 20)


@dataclass(frozen=True)
class Recovery:
    """budgets: (k,) with 0 first. scores: subject -> (k, m) forget scores of the scored rows after each budget."""

    budgets: tuple[int, ...]
    scores: Mapping[str, np.ndarray]

    def recovered(self, subject: str = "unlearned") -> np.ndarray:
        """(k,) R(b); NaN where nothing had been lost."""
        start, original = self.scores[subject][0].mean(), self.scores["original"][0].mean()
        lost = original - start
        return (self.scores[subject].mean(1) - start) / lost if lost > 0 else np.full(len(self.budgets), np.nan)

    def steps_to(self, tau: float = 0.8, subject: str = "unlearned") -> int | None:
        """The least budget that reaches tau times the original's score; None where none does."""
        reached = self.scores[subject].mean(1) >= tau * self.scores["original"][0].mean()
        return self.budgets[int(reached.argmax())] if reached.any() else None

    def excess(self, seed: int = 0) -> tuple[Excess, int]:
        """The largest excess over the retrained model, and the budget where it is."""
        found = [
            excess(a, b, seed=seed) for a, b in zip(self.scores["unlearned"], self.scores["retrained"], strict=True)
        ]
        best = max(range(len(found)), key=lambda i: found[i].value)
        return found[best], self.budgets[best]


def recovery(
    subjects: Subjects, attack: Attack | None = None, steps: Sequence[int] = STEPS, budget: Budget = Budget(),  # noqa: B008
    memory: Memory | None = None,
) -> Recovery:  # fmt: skip
    """The attack at growing steps on every subject; 0 is the model as it is."""
    attack = Relearning() if attack is None else attack
    chosen = tuple(sorted(set(steps)))
    if not chosen or chosen[0] < 1:
        raise BadSetting(f"expected steps of at least 1, found {tuple(steps)}; 0 is always measured")
    runs = [attacked(subjects, attack, replace(budget, steps=count), memory) for count in chosen]
    rows, scores = runs[0].rows, {}
    for subject in subjects.compared:
        before = subjects.forget_scores(subject)
        after = [getattr(run, "second" if subject == "floor" else subject) for run in runs]
        scores[subject] = np.stack([before if rows is None else before[rows], *after])
    return Recovery((0, *chosen), scores)


@check(
    "relearning_curve", unit="forget score", needs=("retrained", "forget"), attack=True, range=(None, None),
    source="MUSE; language attacks card, 3 (relearning)",
)  # fmt: skip
def relearning_curve(
    subjects: Subjects, budget: Budget = Budget(), steps: Sequence[int] = STEPS, tau: float = 0.8,  # noqa: B008
) -> list[Measurement]:  # fmt: skip
    """Relearning at growing steps: the largest forget score, the recovered share, and the steps to tau of the original."""
    attack = Relearning()
    if attack.skipped(subjects) is not None:
        return []
    found = recovery(subjects, attack, steps, budget)
    best, at = found.excess(subjects.seed)
    place = found.budgets.index(at)
    curves = {
        s: {"step": list(found.budgets), "forget_score": v.mean(1).tolist(), "recovered": _plain(found.recovered(s))}
        for s, v in found.scores.items()
    }
    last = {s: found.steps_to(tau, s) for s in found.scores}
    told = ", ".join(f"{s} {'>' + str(found.budgets[-1]) if n is None else n}" for s, n in last.items())
    note = f"excess over retrained {best} at {at} steps; steps to {tau:g} of the original: {told}"
    score = subjects.measure(lambda s: found.scores[s][place])
    lists = {s: v[place].tolist() for s, v in found.scores.items()}
    share = Measured({s: _number(found.recovered(s)[-1]) for s in ("unlearned", "retrained") if s in found.scores})
    count = Measured({s: float(found.budgets[-1] if n is None else n) for s, n in last.items() if s != "floor"})
    make = relearning_curve.measurement
    return [
        make(score, name="forget_score", split="forget", note=note, curves=curves, per_example=lists),
        make(share, name="recovered_share", split="forget", unit="share", note=f"after {found.budgets[-1]} steps"),
        make(count, name="steps_to_tau", split="forget", unit="steps", note=told, direction="match"),
    ]


@check(
    "recovered_share", unit="share", needs=("retrained", "forget"), kinds=("language",), attack=True,
    source="arXiv 2410.08827 (RTT)",
)  # fmt: skip
def recovered_share(
    subjects: Subjects,
    budget: Budget = Budget(),  # noqa: B008
    column: str = "author",
    parts: int = 5,
) -> list[Measurement]:
    """Retraining on all parts of the facts but one: score of the part left out over the original's under the same attack."""
    attack = RetrainingOnParts(column=column, parts=parts)
    if attack.skipped(subjects) is not None:
        return []
    found = attacked(subjects, attack, budget)
    top = max(float(found.original.mean()), 1e-12)
    values = {s: float(getattr(found, s).mean()) / top for s in ("original", "unlearned", "retrained")}
    if found.second is not None:
        values["floor"] = abs(float(found.second.mean()) / top - values["retrained"])
    lists = {s: (getattr(found, s) / top).tolist() for s in ("original", "unlearned", "retrained")}
    note = f"{len(np.unique(attack.dealt(subjects.case)))} parts by '{column}', {budget.steps} steps each"
    return [recovered_share.measurement(Measured(values), split="forget", note=note, per_example=lists)]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _plain(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values]
