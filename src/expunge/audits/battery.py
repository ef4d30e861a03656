"""The battery: every active attack on every subject, and the verdict that rests on it.

subjects = Subjects(case, original, unlearned, retrained, floor)
verdict = judge(subjects)                                    # one seed
verdict = judge([subjects_0, subjects_1, subjects_2])        # three or more seeds: intervals over seeds as well
verdict = judge(subjects, attacks=[*default_attacks(), Trigger(my_patch)], budget=Budget(steps=10))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expunge.audits.attacks.budget import Attack, Attacked, Budget, Memory, attacked
from expunge.audits.attacks.direction_ablation import DirectionAblation
from expunge.audits.attacks.drawing import NewSeeds, OtherWordings, RandomPrefix
from expunge.audits.attacks.lens import HeadProjection, LogitLens
from expunge.audits.attacks.probe import LinearProbe
from expunge.audits.attacks.prompt_probe import PromptProbe
from expunge.audits.attacks.prompts import PromptTemplates
from expunge.audits.attacks.pruning import Pruning, TargetedPruning
from expunge.audits.attacks.quantisation import Quantisation
from expunge.audits.attacks.relearning import BenignRelearning, Relearning, RetrainingOnParts
from expunge.audits.attacks.soft_prompt import SoftPrompt
from expunge.audits.attacks.suffix import SuffixSearch
from expunge.audits.attacks.unlearndiffatk import EmbeddingSearch, UnlearnDiffAtk
from expunge.audits.attacks.unwrapping import Unwrapping
from expunge.audits.residue import RESAMPLES, Evidence, Membership
from expunge.audits.verdict import Thresholds, Verdict, decide, proved
from expunge.errors import BadSetting, MissingGold, UnmetNeed, nearest
from expunge.seeds import generator

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

PARTS = 20
"""Parts of the split that a utility without a value for each example is measured on."""


BY_KIND: dict[str, tuple[Attack, ...]] = {
    "language": (LogitLens(), DirectionAblation(), TargetedPruning(), PromptTemplates(), SoftPrompt()),
    "diffusion": (UnlearnDiffAtk(), OtherWordings()),
}
"""What the battery of a kind of model has beyond every kind's."""
BY_NAME: dict[str, tuple[Attack, ...]] = {
    "language": (
        Relearning(share=1.0, rank=8), RetrainingOnParts(), HeadProjection(), HeadProjection(delta=True), PromptProbe(),
        SoftPrompt(each=True), SuffixSearch(), SuffixSearch(each=True),
    ),
    "diffusion": (Relearning(share=1.0, rank=8), RandomPrefix(), NewSeeds(), EmbeddingSearch()),
}  # fmt: skip
"""Attacks of a kind that take longer, or whose score is no forget score: run when asked for by name."""


def default_attacks(kind: str = "") -> tuple[Attack, ...]:
    """The battery that every audit of this kind of model runs; those that do not apply to a case are skipped, and the
    verdict says so."""
    return (
        BenignRelearning(), Relearning(), Quantisation(8), Quantisation(4), Pruning(0.2), Pruning(0.5), LinearProbe(),
        Unwrapping(), *BY_KIND.get(kind, ()),
    )  # fmt: skip


def find_attacks(wanted: Iterable[str | Attack] | None, kind: str = "") -> list[Attack]:
    """Attacks by name or as they are; None for the default battery of the kind."""
    battery = {attack.name: attack for attack in default_attacks(kind)}
    known = battery | {attack.name: attack for attack in BY_NAME.get(kind, ())}
    found: list[Attack] = []
    for item in battery.values() if wanted is None else wanted:
        if not isinstance(item, Attack) and item not in known:
            raise BadSetting(
                f"expected an attack, one of {', '.join(known)}, found '{item}'.{nearest(str(item), known)} "
                "Use one of them, or pass an Attack."
            )
        found.append(item if isinstance(item, Attack) else known[item])
    twice = {attack.name for attack in found if sum(other.name == attack.name for other in found) > 1}
    if twice:
        raise BadSetting(f"expected attacks of different names, found {', '.join(sorted(twice))} twice; leave one out")
    return found


def attack_all(
    subjects: Subjects,
    attacks: Iterable[str | Attack] | None = None,
    budget: Budget = Budget(),  # noqa: B008
    progress: Callable[[Attack], None] | None = None,
    memory: Memory | None = None,
) -> dict[str, Attacked]:
    """Attack -> forget scores of every subject after it. `progress` is called before each.

    memory: a dict of the caller's that keeps what attacks did to the original and the retrained models, to compare many
    methods on one case at a quarter of the time; hand it on only with the same case, original, golds and audit seed.
    """
    found = {}
    for attack in find_attacks(attacks, subjects.task.name):
        if attack.skipped(subjects) is None:
            if progress is not None:
                progress(attack)
            found[attack.name] = attacked(subjects, attack, budget, memory)
    return found


def gather(
    subjects: Subjects,
    attacks: Iterable[str | Attack] | None = None,
    budget: Budget = Budget(),  # noqa: B008
    progress: Callable[[Attack], None] | None = None,
    memory: Memory | None = None,
    signal: str = "margin",
) -> Evidence:
    """All that the verdict reads, of one seed. signal: what membership ranks by (as the check `membership`)."""
    lacking = [text for text in map(subjects.unmet, ("retrained", "floor")) if text]
    if lacking:
        raise MissingGold("the verdict cannot be given:\n" + "\n".join(f"- {text}" for text in lacking))
    if subjects.unmet("forget"):
        raise UnmetNeed(str(subjects.unmet("forget")))
    chosen = find_attacks(attacks, subjects.task.name)
    models = ("original", "unlearned", "retrained", "floor")
    membership = None
    if subjects.unmet("holdout") is None:
        membership = {
            name: Membership(subjects.signal(name, "forget", signal), subjects.signal(name, "holdout", signal))
            for name in models
        }
    scores = [subjects.forget_scores(name, "forget") for name in models]
    return Evidence(
        *scores,
        attacks=attack_all(subjects, chosen, budget, progress, memory),
        membership=membership,
        utility=utilities(subjects),
        skipped={attack.name: why for attack in chosen if (why := attack.skipped(subjects)) is not None},
    )


def utilities(subjects: Subjects) -> dict[str, np.ndarray] | None:
    """Subject -> (t,) values whose mean is the task's utility on test, or retain; None without an untrained model.

    Of a case with an exam: one for each answer to the cells that must stay. Else one for each example where the task's
    utility is a mean of one of its signals (accuracy: correctness; minus the mean loss), else the utility on 20 parts of
    the split.
    """
    exam = subjects.case.exam
    if exam is not None and subjects.unmet("untrained") is None:
        return {
            name: subjects.over("useful", name, "retain", lambda model, _: exam.useful(model))
            for name in ("original", "unlearned", "retrained", "untrained")
        }
    split = next((name for name in ("test", "retain") if subjects.unmet(name) is None), None)
    if split is None or subjects.unmet("untrained") is not None:
        return None
    models = ("original", "unlearned", "retrained", "untrained")

    def values(name: str, key: str) -> np.ndarray:
        return -subjects.losses(name, split) if key == "" else subjects.signal(name, split, key)

    utility = subjects.task.utility
    for key in ("", *subjects.signals("original", split)):
        if all(
            np.isclose(values(m, key).mean(), subjects.evaluate(m, split)[utility], rtol=1e-4, atol=1e-6)
            for m in models
        ):
            return {name: values(name, key) for name in models}
    rows = subjects.case.split(split)
    order = torch.randperm(len(rows), generator=generator(subjects.seed, "utility parts"))
    places = order.tensor_split(min(PARTS, len(rows)))
    parts = [rows.subset(part) for part in places]
    return {
        name: np.array(
            [subjects.task.evaluate(subjects.model(name), part.batches(subjects.batch_size))[utility] for part in parts]
        )
        for name in models
    }


def judge(
    subjects: Subjects | Sequence[Subjects],
    attacks: Iterable[str | Attack] | None = None,
    budget: Budget = Budget(),  # noqa: B008
    thresholds: Thresholds = Thresholds(),  # noqa: B008
    proof: Mapping[str, Any] | None = None,
    progress: Callable[[Attack], None] | None = None,
    memory: Memory | None = None,
    resamples: int = RESAMPLES,
) -> Verdict:
    """The verdict on one seed's subjects or several seeds'. A `proof` that holds settles it unmeasured."""
    seeds = list(subjects) if isinstance(subjects, Sequence) else [subjects]
    chosen = find_attacks(attacks, seeds[0].task.name if seeds else "")
    settled = None if proof is None else proved(proof, thresholds)
    if settled is not None:
        return settled
    return decide([gather(item, chosen, budget, progress, memory) for item in seeds], thresholds, proof, resamples)
