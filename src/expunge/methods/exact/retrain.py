"""Retraining from scratch without the forget rows: the gold that every other method is measured against.

    theta_u = train(fresh initialisation, D_r)          (recipe of the case, seed of the unlearning run)

No paper: it is the definition. The fresh model is initialised anew at every depth (`Case.fresh`); a known official
helper resets direct children only and so keeps nested layers trained. Its spread over seeds is the noise floor of every
distance.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import nn

from expunge.engine.execute import fit
from expunge.engine.workbench import Workbench
from expunge.methods.registry import method, setting
from expunge.parts.plan import Exact


def train_on_retain(bench: Workbench) -> nn.Module:
    """A fresh model, trained by the recipe (a protected one: in its own way) on the retain rows with the run's seed."""
    if hasattr(bench.case.model, "expunge_train"):
        return fit(bench.case, "retain", bench.seed).to(bench.device)
    return fit(bench.case, "retain", bench.seed, model=bench.case.fresh(bench.seed).to(bench.device))


def same_as_clean(bench: Workbench, model: nn.Module) -> dict[str, Any]:
    """Byte equality with another retraining of the same seed: nothing but seed, recipe and retain rows went in."""
    return compared(model, train_on_retain(bench))


def compared(model: nn.Module, clean: nn.Module) -> dict[str, Any]:
    """A proof's numbers: largest absolute and relative difference of the two state dicts (0 and 0 when bit-equal)."""
    a, b = model.state_dict(), clean.state_dict()
    pairs = [(a[k], b[k].to(a[k].device)) for k in a if a[k].numel()]
    equal = all(torch.equal(x, y) for x, y in pairs)
    largest = max((float((x.double() - y.double()).abs().max()) for x, y in pairs), default=0.0)
    scale = max((float(y.double().abs().max()) for _, y in pairs), default=1.0)
    kind = "proved" if equal else "unproved"
    return {
        "kind": kind,
        "equal_bytes": equal,
        "largest_difference": largest,
        "relative_difference": largest / max(scale, 1e-300),
    }


@method(
    family="exact", needs=("retain", "recipe"), intention="removal", mechanism="retraining", guarantee="exact",
    paper="definition",
)  # fmt: skip
def retrain(
    prove: Annotated[bool, setting("retrain once more and compare byte by byte (outside the measured time)")] = False,
) -> Exact:
    """Train a fresh model by the case's recipe on the retain data."""
    return Exact(train_on_retain, "train(fresh, retain)", same_as_clean if prove else None)
