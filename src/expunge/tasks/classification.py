"""Classification: any `nn.Module` whose output is (B, K) logits, or a transformers model whose output has `.logits`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import BadSetting
from expunge.tasks.base import Batch, Choice, Measurements, Output, PerExample, Task, evaluating, move_to_model

RELABEL_POLICIES = ("other", "uniform")


def call_model(model: nn.Module, inputs: Tensor) -> Tensor:
    """Run a plain module positionally and a transformers model by its main input's name; return the tensor it predicts."""
    name = getattr(model, "main_input_name", None)
    keyword = name if isinstance(name, str) and name != "input_ids" and hasattr(model, "config") else None
    result = model(inputs) if keyword is None else model(**{keyword: inputs})
    if isinstance(result, Tensor):
        return result
    if hasattr(result, "logits"):
        return result.logits
    if isinstance(result, dict) and "logits" in result:
        return result["logits"]
    if isinstance(result, (tuple, list)) and isinstance(result[0], Tensor):
        return result[0]
    raise TypeError(f"expected the model to return a tensor or an object with .logits, found {type(result).__name__}")


@dataclass(frozen=True)
class Classification(Task):
    """Inputs -> one of K classes. `inputs` and `labels` name the columns."""

    inputs: str = "inputs"
    labels: str = "labels"
    name = "classification"
    utility = "accuracy"

    @property
    def input(self) -> str:  # type: ignore[override]
        return self.inputs

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        return Output(call_model(model, batch[self.inputs]))

    def loss(self, output: Output, batch: Batch) -> PerExample:
        """Cross-entropy in nats."""
        return F.cross_entropy(output.prediction, batch[self.labels], reduction="none")

    def divergence(self, output: Output, other: Output, batch: Batch, temperature: float = 1.0) -> PerExample:
        """KL(other || output) in nats at `temperature`, without the T^2 factor (objectives add it where papers do)."""
        log_q = F.log_softmax(output.prediction / temperature, dim=-1)
        log_p = F.log_softmax(other.prediction / temperature, dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def per_choice(
        self, function: Choice, output: Output, batch: Batch, other: Output | None = None, reduce: str = "mean"
    ) -> Tensor:
        """One choice for each example: `function` of (B, K) logits and (B,) labels."""
        rest = () if other is None else (other.prediction,)
        value = function(output.prediction, batch[self.labels], *rest)
        return value[:, None] if reduce == "none" else value

    def relabel(self, batch: Batch, rng: torch.Generator, policy: str = "other") -> Batch:
        """`other`: uniform over the K-1 wrong classes; `uniform`: over all K (SalUn's official code)."""
        labels, classes = batch[self.labels], batch.columns.get("_classes") or self.classes(batch)
        if policy == "other":
            shift = torch.randint(1, classes, labels.shape, generator=rng).to(labels.device)
            new = (labels + shift) % classes
        elif policy == "uniform":
            new = torch.randint(0, classes, labels.shape, generator=rng).to(labels.device)
        else:
            raise BadSetting(
                f"expected a relabel policy of classification, one of {RELABEL_POLICIES}, found {policy!r}; use one of them"
            )
        return batch.with_columns(**{self.labels: new})

    def constants(self, model: nn.Module, data: Any) -> dict[str, Any]:
        """`_classes`: K, read off the model's output for one row."""
        if len(data) == 0:
            return {}
        with evaluating(model):
            row = move_to_model(data.fetch(torch.zeros(1, dtype=torch.int64)), model)
            return {"_classes": int(self.forward(model, row).prediction.shape[-1])}

    def classes(self, batch: Batch) -> int:
        raise BadSetting(
            "expected the number of classes to be known when relabelling, found none; "
            "run the method through unlearn(), or add a '_classes' column to the batch"
        )

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Measurements:
        right, total, loss = 0, 0, 0.0
        with evaluating(model):
            for batch in batches:
                batch = move_to_model(batch, model)
                output = self.forward(model, batch)
                right += int((output.prediction.argmax(-1) == batch[self.labels]).sum())
                loss += float(self.loss(output, batch).double().sum())
                total += len(batch)
        if total == 0:
            return {"accuracy": float("nan"), "loss": float("nan"), "n": 0}
        return {"accuracy": right / total, "loss": loss / total, "n": total}

    def forget_score(self, output: Output, batch: Batch) -> PerExample:
        """Probability of the true class."""
        return (-self.loss(output, batch)).exp()

    def signals(self, output: Output, batch: Batch) -> dict[str, PerExample]:
        """Song-Mittal's scores, all turned so that higher means member; margin = f_y - logsumexp of the others."""
        logits, y = output.prediction.double(), batch[self.labels]
        log_p = F.log_softmax(logits, dim=-1)
        p = log_p.exp()
        own = log_p.gather(1, y[:, None]).squeeze(1)
        others = logits.scatter(1, y[:, None], float("-inf"))
        log_not = torch.log1p(-p.clamp(max=1 - 1e-15))
        off = (p * log_not).scatter(1, y[:, None], 0.0).sum(1)
        return {
            "correctness": (logits.argmax(-1) == y).double(),
            "confidence": own.exp(),
            "loss": own,
            "entropy": (p * log_p).sum(1),
            "modified_entropy": (1 - own.exp()) * own + off,
            "margin": logits.gather(1, y[:, None]).squeeze(1) - others.logsumexp(1),
        }

    def problems(self, model: nn.Module, batch: Batch) -> list[str]:
        if self.inputs not in batch.columns:
            have = ", ".join(sorted(k for k in batch.columns if not k.startswith("_")))
            return [f"expected a column '{self.inputs}', found {have}; rename it or pass Classification(inputs=...)"]
        labels = batch.columns.get(self.labels)  # label-free methods run without, and say so through their needs
        whole = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() == 1
        if labels is not None and not whole:
            what = (
                f"{labels.dtype} of shape {tuple(labels.shape)}"
                if isinstance(labels, Tensor)
                else type(labels).__name__
            )
            return [
                f"expected labels as one integer per example, found {what}; convert them to int64 class numbers, "
                "or use task='regression' for real targets"
            ]
        with evaluating(model):
            try:
                logits = self.forward(model, move_to_model(batch, model)).prediction
            except Exception as error:
                return [
                    f"expected the model to run on inputs of shape {tuple(batch[self.inputs].shape)}, found "
                    f"{type(error).__name__}: {error}; check the data's layout and transform"
                ]
        if logits.dim() != 2 or logits.shape[0] != len(batch) or logits.shape[1] < 2:
            return [
                f"expected logits of shape ({len(batch)}, classes >= 2) for classification, found {tuple(logits.shape)}; "
                "wrap the model so that it returns logits, or use task='regression' for values"
            ]
        low, high = (0, 0) if labels is None else (int(labels.min()), int(labels.max()))
        if low < 0 or high >= logits.shape[1]:
            return [
                f"expected labels in 0..{logits.shape[1] - 1} (the model has {logits.shape[1]} outputs), found {low}..{high}; "
                "renumber the labels or load the model with the right number of classes"
            ]
        return []
