"""Latent probe of a diffusion model: do its features still part noised images of the target from others?

    x_t = a_t x + b_t e,  no condition   ->   mid-block of the UNet, mean over space (n, C)   ->   logistic regression: target or not

For each of a few noise levels, on rows of the forget split against rows that stay, cross-fitted in five parts: the score of a forgotten
row is the share of the kept rows of its part that the probe puts below it (one half for ties), by a probe that was fitted on
neither. Their mean is an AUC: 0.5 where nothing parts them. Nothing is told to the network (the null condition), else the condition
itself would be read. A probe reads what pixels say through any network, so selectivity is what it gains over a network of untrained
weights; the level with the original's largest gain is taken for all models. And a network that never saw the target parts it too, where
other images taught it the strokes: the retrained model is the zero line. (Generation audits card.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expunge.audits.attacks.budget import Budget
from expunge.audits.attacks.probe import FOLDS
from expunge.audits.base import Measurement, check
from expunge.errors import BadSetting
from expunge.seeds import derive, generator
from expunge.tasks.base import evaluating, move_to_model

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case
    from expunge.cases.data import Split

LEVELS = (0.1, 0.3, 0.5)
LEAST = 10
"""Rows of either kind below which five parts are too small."""


def middle_features(
    model: Any, case: Case, split: Split, level: float, seed: int = 0, batch_size: int = 256
) -> np.ndarray:
    """(n, C) float64: the mid-block's output on noised rows without a condition, mean over space. level: share of the schedule."""
    task: Any = case.task
    caught: list[torch.Tensor] = []
    handle = model.network.mid_block.register_forward_hook(lambda _, __, out: caught.append(out.flatten(2).mean(2)))
    try:
        with evaluating(model):
            for number, batch in enumerate(split.batches(batch_size)):
                batch = move_to_model(
                    task.prepare(batch, generator(seed, "latent probe", split.name, number)).with_columns(
                        level=torch.full((len(batch),), level)
                    ),
                    model,
                )
                task.forward(model, task.with_condition(batch, model.conditions.like(task.condition(batch))))
    finally:
        handle.remove()
    return torch.cat(caught).double().cpu().numpy()


def placements(target: np.ndarray, others: np.ndarray, seed: int) -> np.ndarray:
    """(n,) share of the held-out others (m, C) that a probe puts below each held-out row of the target (n, C); their mean is the AUC."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    x, y = np.concatenate([target, others]), np.arange(len(target) + len(others)) < len(target)
    found = np.zeros(len(target))
    parts = StratifiedKFold(FOLDS, shuffle=True, random_state=derive(seed, "latent probe") % 2**32)
    for fitted, held in parts.split(x, y):
        centre, spread = x[fitted].mean(0), x[fitted].std(0)
        scaled = (x - centre) / np.where(spread > 0, spread, 1.0)
        probe = LogisticRegression(class_weight="balanced", max_iter=300, tol=1e-3).fit(scaled[fitted], y[fitted])
        says = probe.decision_function(scaled[held])
        gap = says[y[held]][:, None] - says[~y[held]][None]
        found[held[y[held]]] = (gap > 0).mean(1) + 0.5 * (gap == 0).mean(1)
    return found


def unfit(subjects: Subjects) -> str | None:
    """Why the probe cannot be fitted, or None."""
    for name in subjects.compared:
        model: Any = subjects.model(name)
        if hasattr(model, "draw"):
            return "expected a denoiser, found a one-step generator, which is not asked at other timesteps"
        if getattr(model.network, "mid_block", None) is None:
            return f"expected a network with a mid-block, found {type(model.network).__name__}"
        if model.kind == "class" and model.conditions.null_id is None:
            return "expected a model with a null class, found none: a condition would tell the target"
    return None


@check(
    "latent_probe", unit="AUC", range=(0.0, 1.0), needs=("retrained", "forget", "retain"), kinds=("diffusion",), attack=True,
    source="generation audits card",
)  # fmt: skip
def latent_probe(
    subjects: Subjects, budget: Budget = Budget(), levels: Sequence[float] = LEVELS,  # noqa: B008
) -> list[Measurement]:  # fmt: skip
    """AUC of a linear probe of mid-block features for noised images of the target, without a condition; its gain over untrained weights."""
    if not levels or not all(0 < level < 1 for level in levels):
        raise BadSetting(f"expected noise levels as shares of the schedule in (0, 1), found {levels}; e.g. {LEVELS}")
    case, seed = subjects.case, subjects.seed
    forget, retain = (
        rows if len(rows) <= budget.queries else rows.sample(budget.queries, generator(seed, "latent probe", name))
        for name, rows in ((name, case.split(name)) for name in ("forget", "retain"))
    )
    if unfit(subjects) is not None or min(len(forget), len(retain)) < LEAST:
        return []
    has_control = subjects.unmet("untrained") is None
    tables = {
        subject: np.stack([
            placements(*(middle_features(subjects.model(subject), case, rows, level, seed) for rows in (forget, retain)), seed)
            for level in levels
        ])
        for subject in (*subjects.compared, *(["untrained"] if has_control else []))
    }  # fmt: skip
    control = tables.pop("untrained", np.full((len(levels), len(forget)), 0.5))
    best = int((tables["original"] - control).mean(1).argmax())
    about = f"at noise level {levels[best]:g}; {len(forget)} rows against {len(retain)}"
    about += f"; untrained {control[best].mean():.3f}" if has_control else ""

    def told(name: str, values: dict[str, np.ndarray], limits: tuple[float, float]) -> Measurement:
        return latent_probe.measurement(
            subjects.measure(lambda s: values[s]), name=name, split="forget", direction="match", range=limits, note=about,
            per_example={s: v.tolist() for s, v in values.items()},
            curves={s: {"level": list(levels), "auc": t.mean(1).tolist()} for s, t in tables.items()},
        )  # fmt: skip

    found = [told("probe_auc", {s: t[best] for s, t in tables.items()}, (0.0, 1.0))]
    if has_control:
        found.append(told("probe_selectivity", {s: t[best] - control[best] for s, t in tables.items()}, (-1.0, 1.0)))
    return found
