"""Penalties on the weights themselves. Each is one number for the batch, given to every example, so that a term's mean over
the batch is the penalty and its weight reads against the mean loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from expunge.cases.data import Split
from expunge.errors import BadSetting, ExpungeWarning, nearest
from expunge.parts.objectives.base import Objective
from expunge.parts.step import Step
from expunge.seeds import generator
from expunge.tasks.base import PerExample


@dataclass(frozen=True)
class Norm(Objective):
    power: int = 1

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise BadSetting(f"expected power 1 or 2, found {self.power}; choose one")

    def __call__(self, step: Step) -> PerExample:
        weights = [p for p in step.model.parameters() if p.requires_grad]
        total = sum((p.abs() if self.power == 1 else p.square()).sum() for p in weights)
        return torch.as_tensor(total, device=step.batch.ids.device).expand(len(step.batch))

    def __str__(self) -> str:
        return f"‖θ‖{'₁' if self.power == 1 else '₂²'}"


@dataclass(frozen=True)
class Anchor(Objective):
    """Distance of the weights from a frozen model's: L1 (soft SalUn's) or squared L2 (EWC without its weights)."""

    power: int = 2
    reference: str = "original"

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "features"),)

    def __call__(self, step: Step) -> PerExample:
        anchor = dict(step.references.model(self.reference).named_parameters())
        total: Any = 0.0
        for name, p in step.model.named_parameters():
            if p.requires_grad:
                delta = p - anchor[name].to(p)
                total = total + (delta.abs() if self.power == 1 else delta.square()).sum()
        return torch.as_tensor(total).expand(len(step.batch))

    def __str__(self) -> str:
        return f"‖θ-θ_{self.reference}‖{'₁' if self.power == 1 else '₂²'}"


@dataclass(frozen=True)
class Ewc(Objective):
    """1/2 sum_k F_k (theta_k - theta_o,k)^2, F the diagonal Fisher information at the weights before the first step (Kirkpatrick et
    al., 2017, 1612.00796): F_k = mean over `samples` rows of (d energy / d theta_k)^2, one gradient for each row.

    Zero for parameters whose name matches none of `over`. The gradient is squared example by example: of a batch's mean it
    would shrink with the batch.
    """

    samples: int = 32
    of: str | Callable[[Any], Split] = "train"
    over: tuple[str, ...] = ("*",)
    energy: Callable[[Step], Tensor] | None = None
    reference: str = "original"

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return ((self.reference, "features"),)

    def prepare(self, workbench: Any, split: str) -> dict[str, Tensor]:
        split_of = workbench.splits[self.of] if isinstance(self.of, str) else self.of(workbench)
        rows = split_of.sample(self.samples, generator(workbench.seed, "fisher"))
        found = workbench.importance(rows, batch_size=1, power=2, energy=self.energy)
        return {name: found[name] for name in matching_names(found, self.over)}

    def __call__(self, step: Step) -> PerExample:
        now, then = dict(step.model.named_parameters()), dict(step.references.model(self.reference).named_parameters())
        total: Any = 0.0
        for name, weight in step.scratch["memory"].items():
            total = total + (weight * (now[name] - then[name].to(now[name])).square()).sum()
        return torch.as_tensor(0.5 * total, device=step.batch.ids.device).expand(len(step.batch))

    def __str__(self) -> str:
        return f"½F(θ-θ_{self.reference})²"


FORMS = ("il2", "nl2", "el2")
DISTANCES = ("mean", "sum", "official")


@dataclass(frozen=True)
class Repel(Objective):
    """Push the weights away from other models' (Adapt-then-Unlearn, 2309.14054), with d a squared distance:

        il2: 1/d        nl2: -d (unbounded: it diverges where the rest of the loss does not hold it)        el2: exp(-alpha d)

    distance: "mean", d = mean over copies and tensors of the tensor's mean squared difference, so that every tensor counts alike
    and copies do not add up; "sum", d_i = ||theta - theta_i||^2 for each of M copies and the mean of the M values (the paper's
    formula); "official", M^2 / 2 times "mean" (the released code's).
    """

    copies: tuple[str, ...]
    form: str = "el2"
    alpha: float = 1.0
    distance: str = "mean"

    def __post_init__(self) -> None:
        for value, known, what in ((self.form, FORMS, "form"), (self.distance, DISTANCES, "distance")):
            if value not in known:
                raise BadSetting(f"expected a {what}, one of {', '.join(known)}, found {value!r}; use one of them")
        if not self.copies or self.alpha <= 0:
            raise BadSetting(f"expected copies and alpha > 0, found {self.copies} and {self.alpha}; correct them")

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return tuple((name, "features") for name in self.copies)

    def prepare(self, workbench: Any, split: str) -> None:
        if self.form == "nl2":
            workbench.warn(
                "nl2 repels without bound: the weights leave for ever where the other terms do not hold them; watch the losses, "
                "take a smaller weight, or el2 or il2",
                ExpungeWarning,
            )

    def __call__(self, step: Step) -> PerExample:
        moving = {n: p for n, p in step.model.named_parameters() if p.requires_grad}
        others = [dict(step.references.model(name).named_parameters()) for name in self.copies]
        gaps = [[(p - other[n].to(p)).square() for n, p in moving.items()] for other in others]
        if self.distance == "sum":
            d = torch.stack([torch.stack([g.sum() for g in one]).sum() for one in gaps])
        else:
            d = torch.stack([torch.stack([g.mean() for g in one]).mean() for one in gaps]).mean()[None]
            d = d * len(self.copies) ** 2 / 2 if self.distance == "official" else d
        value = {"il2": lambda: 1 / d, "nl2": lambda: -d, "el2": lambda: (-self.alpha * d).exp()}[self.form]()
        return value.mean().expand(len(step.batch))

    def __str__(self) -> str:
        text = {"il2": "1/d", "nl2": "-d", "el2": f"exp(-{self.alpha:g}d)"}[self.form]
        return f"{text} from {len(self.copies)} cop{'y' if len(self.copies) == 1 else 'ies'}"


def matching_names(names: Mapping[str, Any] | nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Parameter names that match a pattern, in order; none is an error."""
    known = [n for n, _ in names.named_parameters()] if isinstance(names, nn.Module) else list(names)
    found = [n for n in known if any(fnmatchcase(n, p) for p in patterns)]
    if not found:
        raise BadSetting(
            f"expected a parameter name that matches {', '.join(patterns)}, found none.{nearest(patterns[0], known)} "
            f"Names: {', '.join(known[:6])}, ..."
        )
    return found


def l1() -> Objective:
    """Sum of |theta| over all trainable parameters (weights, biases, norm parameters), by its sub-gradient."""
    return Norm(1)


def l2() -> Objective:
    """Sum of theta^2 over all trainable parameters."""
    return Norm(2)


def anchor(power: int = 2, reference: str = "original") -> Objective:
    """Keep the weights near a frozen model's."""
    return Anchor(power, reference)


def ewc(
    samples: int = 32,
    of: str | Callable[[Any], Split] = "train",
    over: str | tuple[str, ...] = "*",
    energy: Callable[[Step], Tensor] | None = None,
    reference: str = "original",
) -> Objective:
    """Elastic weight consolidation: keep the weights near a frozen model's where its Fisher information is large.

    samples, of: rows and split of the Fisher estimate (or what makes one of the workbench: `DrawnRows`). over: patterns of
    parameter names. energy: a (B,) function of the step whose gradient is squared; default: the task's loss. The weight of the
    term is lambda, on the estimate as it is.
    """
    return Ewc(samples, of, (over,) if isinstance(over, str) else tuple(over), energy, reference)


def repel(copies: str | tuple[str, ...], form: str = "el2", alpha: float = 1.0, distance: str = "mean") -> Objective:
    """Push the trainable weights away from frozen networks of the run, by name (adapted copies, a bad teacher)."""
    return Repel((copies,) if isinstance(copies, str) else tuple(copies), form, alpha, distance)
