"""Many models of one case, for the attacks and distances that need distributions (U-LiRA, RMIA, KLoM, the 2023 challenge).

`original`, `retrained` and a second, independent `floor` ensemble are trained at once by the vectorised ensemble; `unlearned`
is the method applied to each original. All start from different initialisations: the law is over training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from expunge.cases.case import Case
from expunge.engine.ensemble import Ensemble
from expunge.errors import BadSetting, MissingGold
from expunge.seeds import derive

if TYPE_CHECKING:
    from expunge.methods.outcome import Outcome

LEAST = 8
"""Fewest models per ensemble: below it a Gaussian per example is noise."""


def reference_ensembles(case: Case, count: int, seed: int = 0) -> dict[str, Ensemble]:
    """`original`, `retrained` and `floor`, `count` models each."""
    if count < LEAST:
        raise BadSetting(
            f"expected at least {LEAST} shadow models, found {count}; ask for more, or for none with shadows=0"
        )
    if case.recipe is None:
        raise MissingGold("expected the training recipe for shadow models, found none; pass Case(recipe=Training(...))")
    rows = {
        "original": case.split("train").ids,
        "retrained": case.split("retain").ids,
        "floor": case.split("retain").ids,
    }
    members = [ids for ids in rows.values() for _ in range(count)]
    seeds = [derive(seed, "shadow", name, i) for name in rows for i in range(count)]
    everything = Ensemble.train(case.fresh, case.task, case.data, members, case.recipe, seeds)
    models = everything.models()
    return {name: Ensemble.from_models(models[k * count : (k + 1) * count], case.task) for k, name in enumerate(rows)}


def unlearned_ensemble(case: Case, outcome: Outcome, originals: Ensemble, seed: int = 0) -> Ensemble:
    """The outcome's method on each original, with its own unlearning seed."""
    from expunge.methods.outcome import unlearn

    which: Any = outcome.method if outcome.method is not None else outcome.action
    made = [
        unlearn(case.with_(model=model.train()), which, seed=derive(seed, "shadow unlearning", i), floor=None).model
        for i, model in enumerate(originals.models())
    ]
    with torch.no_grad():
        return Ensemble.from_models(made, case.task)
