"""ACU: a ridge head in closed form over frozen features; a deletion subtracts the rows from two sums.

Paper: "ACU: Analytic Continual Unlearning for Efficient and Exact Forgetting with Privacy Preservation", 2025,
https://arxiv.org/abs/2505.12239. The mathematics is in `analytic.py`; this file makes it a model and a method.

    protect:  A = sum z z' + g I,  C = sum z y',  z = ReLU(phi(x) W_B),  W = A^-1 C
    forget:   A -= sum_f z z',     C -= sum_f z y',  W = A^-1 C        (needs the forget rows only)

phi is the identity (`backbone="inputs"`) or the case's model without its last layer, frozen as it is
(`backbone="model"`). In the second case what phi has learned from the forget rows stays: the result
is exact for the head alone.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from expunge.cases.case import Case
from expunge.cases.data import Split
from expunge.engine.workbench import Workbench
from expunge.methods.exact.analytic import REMOVED, AnalyticClassifier
from expunge.methods.exact.protected import Trunk, outputs, protected_model, rows_of, width_of
from expunge.methods.exact.ridge import sample_digests, solve_head
from expunge.methods.registry import method, setting
from expunge.parts.plan import Exact

ONLY_HEAD = "exact for the head; the backbone keeps what it learned before"


class AnalyticModel(AnalyticClassifier):
    """The analytic learner with one output per class of the task, in class order: a class without live rows gets
    `REMOVED`, so that it is never predicted. For regression: (B, values)."""

    expunge_protection = "acu"

    def __init__(self, backbone: nn.Module | None, features: int, classes: int, **settings: Any):
        super().__init__(backbone, features, **settings)
        self.outputs, self.settings = classes, settings

    def forward(self, inputs: Tensor) -> Tensor:
        scores = super().forward(inputs)
        if bool(self.head.values):
            return scores
        full = scores.new_full((len(scores), self.outputs), REMOVED)
        return full.index_copy(1, self.head.classes, scores)

    def expunge_structure(self) -> dict[str, Any]:
        return {
            "trunk": not isinstance(self.backbone, nn.Identity), "features": self.buffer.weight.shape[0],
            "classes": self.outputs, **self.settings,
        }  # fmt: skip

    @classmethod
    def rebuilt(cls, base: nn.Module, trunk: bool, features: int, classes: int, **settings: Any) -> AnalyticModel:
        return cls(Trunk(base, classes) if trunk else None, features, classes, **settings)

    def expunge_train(self, case: Case, rows: Split, seed: int) -> AnalyticModel:
        """A new head on these rows: same backbone, and the buffer of `seed`."""
        backbone = None if isinstance(self.backbone, nn.Identity) else self.backbone
        fresh = AnalyticModel(backbone, self.buffer.weight.shape[0], self.outputs, **{**self.settings, "seed": seed})
        fresh.to(self.head.A.device)
        return fresh.learn_stream(rows_of(case, rows.ids, self.head.A.device))


def learn_head(case: Case, seed: int, backbone: str, width: int, ridge: float, form: str, **_: Any) -> nn.Module:
    """What `expunge.protect(case, "acu", width=1000)` returns."""
    count = outputs(case)
    trunk = Trunk(case.model, count) if backbone == "model" else None
    everything = torch.arange(len(case.data))
    device = next(case.model.parameters(), torch.empty(0)).device
    model = AnalyticModel(
        trunk, width_of(case, trunk, device), count, width=width, ridge=ridge, form=form, seed=seed
    ).to(device)
    return model.learn_stream(rows_of(case, everything, device))


def subtract(bench: Workbench) -> nn.Module:
    model = protected_model(bench, "acu")
    for inputs, labels in rows_of(bench.case, bench.splits["forget"].ids, bench.device):
        model.forget(inputs, labels)
    bench.note("live_rows", model.head.live)
    if not isinstance(model.backbone, nn.Identity):
        bench.note("scope_of_guarantee", ONLY_HEAD)
    return model


BOUND = 1e-5
"""Largest relative difference to the closed form that counts as equal: float64 sums in another order."""


def equals_ridge(bench: Workbench, model: Any) -> dict[str, Any]:
    """The head against one trained in closed form on the live rows of the table alone."""
    head, place = model.head, model.head.A.device
    alive = Counter(row.tobytes() for row in head.digests.cpu().numpy())
    A = head.ridge * torch.eye(head.width, dtype=torch.float64, device=place)
    C, found = torch.zeros_like(head.C), 0
    for inputs, labels in rows_of(bench.case, bench.splits["train"].ids, bench.device):
        keep = torch.zeros(len(labels), dtype=torch.bool)
        for i, digest in enumerate(sample_digests(inputs, labels)):
            if alive[key := bytes.fromhex(digest)] > 0:
                alive[key] -= 1
                keep[i] = True
        Z, y = model.features(inputs[keep.to(place)]), labels[keep.to(place)]
        hot = (y[:, None] == head.classes) if not bool(head.values) else y.reshape(len(y), -1)
        A, C, found = A + Z.T @ Z, C + Z.T @ hot.to(torch.float64), found + len(y)
    clean = solve_head(A, C)
    difference = float((head.W - clean).abs().max()) if clean.numel() else 0.0
    relative = difference / max(float(clean.abs().max()), 1e-300) if clean.numel() else 0.0
    proved = found == head.live and relative < BOUND
    return {
        "kind": "proved" if proved else "unproved",
        "by": "closed form",
        "largest_difference": difference,
        "relative_difference": relative,
        "bound": BOUND,
        "rows": found,
        "scope": "all" if isinstance(model.backbone, nn.Identity) else "head",
    }


@method(
    family="exact", needs=("protection", "labels"), kinds=("classification", "regression"), intention="removal",
    mechanism="closed form", guarantee="exact", paper="ACU, 2025, 2505.12239", learn=learn_head,
    rebuild=AnalyticModel.rebuilt,
)  # fmt: skip
def acu(
    backbone: Annotated[
        Literal["inputs", "model"], setting("features: the inputs, or the model's (chosen at protect)")
    ] = "inputs",
    width: Annotated[int, setting("random features of the head (chosen at protect)", ge=1)] = 1000,
    ridge: Annotated[float, setting("ridge penalty g (chosen at protect)", gt=0)] = 0.1,
    form: Annotated[
        Literal["statistics", "recursive"], setting("sums, or the paper's recursion (chosen at protect)")
    ] = "statistics",
    prove: Annotated[bool, setting("compare with the closed form on the live rows (outside the measured time)")] = True,
) -> Exact:
    """Subtract the forget rows from the two sums that a ridge head depends on."""
    return Exact(subtract, "W = (A - Z_f'Z_f)^-1 (C - Z_f'Y_f)", equals_ridge if prove else None)
