"""Regression: any `nn.Module` whose output is one value (or a vector of values) per example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import BadSetting
from expunge.tasks.base import Batch, Measurements, Output, PerExample, Task, evaluating, move_to_model
from expunge.tasks.classification import call_model

RELABEL_POLICIES = ("marginal", "other", "uniform")


@dataclass(frozen=True)
class Regression(Task):
    """Inputs -> real targets. `error` is the training energy: `l1` (mean |e|) or `mse` (mean e^2)."""

    inputs: str = "inputs"
    labels: str = "labels"
    error: str = "l1"
    name = "regression"
    utility = "fit"

    def __post_init__(self) -> None:
        if self.error not in ("l1", "mse"):
            raise BadSetting(f"expected error to be 'l1' or 'mse', found {self.error!r}; choose one")

    @property
    def input(self) -> str:  # type: ignore[override]
        return self.inputs

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        value = call_model(model, batch[self.inputs])
        return Output(value.squeeze(-1) if value.dim() == 2 and value.shape[1] == 1 else value)

    def constants(self, model: nn.Module, data: Any) -> dict[str, Any]:
        """`_target_mean`, `_target_std` (unbiased) over all rows of the training table, forget rows included."""
        if self.labels not in data.names:
            return {}
        y = data.column(self.labels)
        return {"_target_mean": y.mean(0), "_target_std": y.std(0)} if len(data) > 1 else {}

    def target(self, batch: Batch) -> Tensor:
        y = batch[self.labels]
        return y.squeeze(-1) if y.dim() == 2 and y.shape[1] == 1 else y

    def residual(self, output: Output, batch: Batch) -> Tensor:
        """(B, D) signed errors; D = 1 for one value per example."""
        return (output.prediction - self.target(batch)).reshape(len(batch), -1)

    def loss(self, output: Output, batch: Batch) -> PerExample:
        error = self.residual(output, batch)
        return (error.abs() if self.error == "l1" else error.square()).mean(1)

    def divergence(self, output: Output, other: Output, batch: Batch, temperature: float = 1.0) -> PerExample:
        """The task's own error between two predictions (values have no temperature)."""
        error = (output.prediction - other.prediction).reshape(len(batch), -1)
        return (error.abs() if self.error == "l1" else error.square()).mean(1)

    def relabel(self, batch: Batch, rng: torch.Generator, policy: str = "other") -> Batch:
        """Draws from N(mean, std) of the training targets, which the engine writes into every batch as `_target_mean` and
        `_target_std` (Gaussian-Amnesiac). All policies mean the same here: a real target is almost surely another one."""
        if policy not in RELABEL_POLICIES:
            raise BadSetting(
                f"expected a relabel policy of regression, one of {RELABEL_POLICIES}, found {policy!r}; use one"
            )
        if "_target_mean" not in batch.columns:
            raise BadSetting(
                "expected the targets' mean and spread to be known when relabelling, found none; "
                "run the method through unlearn(), or add '_target_mean' and '_target_std' to the batch"
            )
        y = batch[self.labels]
        noise = torch.randn(y.shape, generator=rng).to(y)
        return batch.with_columns(**{self.labels: batch["_target_mean"].to(y) + batch["_target_std"].to(y) * noise})

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Measurements:
        """mae, rmse, r2 and `fit` = minus the mean loss, the utility (higher is better, unit of the loss)."""
        errors, targets, losses = [], [], []
        with evaluating(model):
            for batch in batches:
                batch = move_to_model(batch, model)
                output = self.forward(model, batch)
                errors.append(self.residual(output, batch).double().cpu())
                targets.append(self.target(batch).reshape(len(batch), -1).double().cpu())
                losses.append(self.loss(output, batch).double().cpu())
        if not errors:
            nan = float("nan")
            return {"mae": nan, "rmse": nan, "r2": nan, "fit": nan, "loss": nan, "n": 0}
        e, y, loss = torch.cat(errors), torch.cat(targets), torch.cat(losses)
        spread = (y - y.mean(0)).square().sum()
        return {
            "mae": float(e.abs().mean()),
            "rmse": float(e.square().mean().sqrt()),
            "r2": float(1 - e.square().sum() / spread) if spread > 0 else float("nan"),
            "fit": -float(loss.mean()),
            "loss": float(loss.mean()),
            "n": len(loss),
        }

    def forget_score(self, output: Output, batch: Batch) -> PerExample:
        """Minus the absolute error, in the target's unit."""
        return -self.residual(output, batch).abs().mean(1)

    def signals(self, output: Output, batch: Batch) -> dict[str, PerExample]:
        error = self.residual(output, batch).double().abs().mean(1)
        return {"loss": -self.loss(output, batch).double(), "margin": -torch.log(error + 1e-6), "error": -error}

    def problems(self, model: nn.Module, batch: Batch) -> list[str]:
        if self.inputs not in batch.columns:
            have = ", ".join(sorted(k for k in batch.columns if not k.startswith("_")))
            return [f"expected a column '{self.inputs}', found {have}; rename it or pass Regression(inputs=...)"]
        labels = batch.columns.get(self.labels)  # label-free methods run without, and say so through their needs
        if labels is not None and not (isinstance(labels, Tensor) and labels.is_floating_point()):
            found = getattr(labels, "dtype", type(labels))
            return [f"expected real targets, found {found}; convert them with .float(), or use task='classification'"]
        with evaluating(model):
            try:
                value = self.forward(model, move_to_model(batch, model)).prediction
            except Exception as error:
                return [
                    f"expected the model to run on inputs of shape {tuple(batch[self.inputs].shape)}, found "
                    f"{type(error).__name__}: {error}; check the data's layout and transform"
                ]
        if labels is not None and value.shape != self.target(batch).shape:
            return [
                f"expected predictions of the targets' shape {tuple(self.target(batch).shape)}, found {tuple(value.shape)}; "
                "make the model return one value per target, or use task='classification' for logits"
            ]
        return []
