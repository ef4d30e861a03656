"""Certified removal: one Newton step on a linear classifier trained with noise, and a bound on what is left.

Paper: "Certified Data Removal from Machine Learning Models", Guo et al., ICML 2020, https://arxiv.org/abs/1911.03030.
The mathematics is in `certified.py`; this file makes it a model and a method.

    protect:  argmin sum_i l(y_i w.x_i) + (lam n / 2) ||w||^2 + b.w,   b ~ N(0, sigma^2 I),  ||x_i|| <= 1
    forget:   w <- w + H^-1 Delta,  beta += bound;   while beta <= sigma eps / sqrt(2 log(1.5 / delta)), else retrain

Inputs are the case's inputs, or its model's features (frozen; the certificate is then about the head alone), each row
scaled to norm <= 1 by itself. There is no intercept.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from expunge.cases.case import Case
from expunge.cases.data import Split
from expunge.engine.workbench import Workbench
from expunge.methods.exact.certified import CertifiedLogistic, unit_rows
from expunge.methods.exact.protected import LiveRows, Trunk, outputs, protected_model, rows_of, width_of
from expunge.methods.registry import method, setting
from expunge.parts.plan import Exact
from expunge.tasks.base import evaluating


class CertifiedModel(nn.Module):
    """backbone (or none) -> rows of norm <= 1 -> `CertifiedLogistic`. Returns (B, K) logits in the inputs' type."""

    expunge_protection = "certified_removal"

    def __init__(
        self, backbone: nn.Module | None, features: int, classes: int, rows: LiveRows, seed: int, **settings: Any
    ):
        super().__init__()
        self.backbone = nn.Identity() if backbone is None else backbone
        self.settings = settings
        self.rows = rows
        self.head = CertifiedLogistic(features, classes, seed=seed, **settings)

    @classmethod
    def trained(
        cls, case: Case, ids: Tensor, backbone: nn.Module | None, classes: int, seed: int, **settings: Any
    ) -> CertifiedModel:
        """A head fitted on the rows `ids`."""
        device = next(case.model.parameters(), torch.empty(0)).device
        width = width_of(case, backbone, device)
        model = cls(backbone, width, classes, LiveRows.of(case.data, ids), seed, **settings).to(device)
        model.head.train_on(*model.table(case, ids))
        return model

    def expunge_structure(self) -> dict[str, Any]:
        return {
            "trunk": not isinstance(self.backbone, nn.Identity), "features": self.head.features,
            "classes": self.head.classes, "rows": len(self.rows.live), "seed": self.head.seed, **self.settings,
        }  # fmt: skip

    @classmethod
    def rebuilt(
        cls, base: nn.Module, trunk: bool, features: int, classes: int, rows: int, seed: int, **settings: Any
    ) -> CertifiedModel:
        return cls(Trunk(base, classes) if trunk else None, features, classes, LiveRows(rows), seed, **settings)

    def features(self, inputs: Tensor) -> Tensor:
        """(B, d) float64, each row of norm at most 1."""
        with evaluating(self.backbone):
            return unit_rows(self.backbone(inputs).flatten(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs)).to(inputs.dtype if inputs.is_floating_point() else torch.float32)

    def table(self, case: Case, ids: Tensor) -> tuple[Tensor, Tensor]:
        """X (n, d) float64 and labels (n,) of these rows."""
        blocks = [(self.features(x), y) for x, y in rows_of(case, ids, self.rows.live.device)]
        return torch.cat([x for x, _ in blocks]), torch.cat([y for _, y in blocks])

    def expunge_train(self, case: Case, rows: Split, seed: int) -> CertifiedModel:
        """A new head on these rows with a perturbation of `seed`."""
        backbone = None if isinstance(self.backbone, nn.Identity) else self.backbone
        return CertifiedModel.trained(
            case.with_(model=self), rows.ids, backbone, self.head.classes, seed, **self.settings
        )


def train_certified(case: Case, seed: int, backbone: str, **settings: Any) -> nn.Module:
    """What `expunge.protect(case, "certified_removal", lam=0.01)` returns."""
    classes = outputs(case)
    trunk = Trunk(case.model, classes) if backbone == "model" else None
    return CertifiedModel.trained(case, torch.arange(len(case.data)), trunk, classes, seed, **settings)


def newton_step(bench: Workbench) -> nn.Module:
    model, ids = protected_model(bench, "certified_removal"), bench.splits["forget"].ids
    gone = model.table(bench.case, ids)
    left = model.rows.remove(bench.case.data, ids)
    removal = model.head.remove(*model.table(bench.case, left), *gone)
    bench.note("retrained", removal.retrained)
    bench.note("budget_spent", removal.share)
    return model


def within_bound(bench: Workbench, model: Any) -> dict[str, Any]:
    """The certificate, beside the true residual, which the bound must cover."""
    head = model.head
    left = model.rows.live.cpu().nonzero().squeeze(1)
    residual = head.residuals(*model.table(bench.case, left))
    true = float(residual.norm() if head.accounting == "joint" else residual.max())
    holds = true <= head.spent * (1 + 1e-9) + 1e-9 and head.spent <= head.budget
    return {
        "kind": "bounded" if holds else "unproved", "epsilon": head.epsilon, "delta": head.delta, "bound": head.spent,
        "budget": head.budget, "residual": true, "accounting": head.accounting, "removals": int(head.removals),
        "trainings": int(head.trainings), "scope": "all" if isinstance(model.backbone, nn.Identity) else "head",
    }  # fmt: skip


@method(
    family="exact", needs=("protection", "labels", "retain"), kinds=("classification",), intention="removal",
    mechanism="newton step", guarantee="certified", paper="Guo et al., ICML 2020, 1911.03030", learn=train_certified,
    rebuild=CertifiedModel.rebuilt,
)  # fmt: skip
def certified_removal(
    backbone: Annotated[
        Literal["inputs", "model"], setting("features: the inputs, or the model's (chosen at protect)")
    ] = "inputs",
    lam: Annotated[float, setting("L2 penalty per row (chosen at protect)", gt=0)] = 1e-2,
    sigma: Annotated[float, setting("spread of the training noise b (chosen at protect)", gt=0)] = 1.0,
    epsilon: Annotated[float, setting("certificate (chosen at protect)", gt=0)] = 1.0,
    delta: Annotated[float, setting("certificate (chosen at protect)", gt=0, lt=1)] = 1e-4,
    loss: Annotated[Literal["logistic", "quadratic"], setting("convex loss (chosen at protect)")] = "logistic",
    accounting: Annotated[
        Literal["joint", "per_class"], setting("budget over all heads, or each (chosen at protect)")
    ] = "joint",
    when_spent: Annotated[Literal["retrain", "refuse"], setting("past the budget (chosen at protect)")] = "retrain",
) -> Exact:
    """One Newton step per request, within an (epsilon, delta) budget; beyond it the head is retrained."""
    return Exact(newton_step, "w += H^-1 (lam m w + sum_forget grad l)", within_bound)
