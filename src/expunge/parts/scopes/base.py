"""Which weights may move. A scope turns into a `Mask`; the masked optimizer step keeps the rest bit for bit."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.errors import BadSetting, nearest
from expunge.seeds import generator

if TYPE_CHECKING:
    from expunge.parts.objectives.base import Objective

Mask = dict[str, Tensor | bool]
"""Parameter name -> True (may move), False (frozen), or a bool tensor of the parameter's shape (True = may move)."""


class Scope:
    """Base of all scopes."""

    comparable: bool = True
    """Whether the task's utility means for what is trained what it means for the original: floors and stops read it."""

    def select(self, workbench: Any) -> Mask:
        """The mask over the model's named parameters, from the model as it is before the first step."""
        raise NotImplementedError

    def thaws(self, name: str) -> bool:
        """Whether a parameter that the model keeps frozen by default may move because this scope names it."""
        return False

    def enter(self, model: nn.Module, workbench: Any) -> nn.Module:
        """What is trained instead of the model (adapters); default: the model itself."""
        return model

    def leave(self, model: nn.Module) -> nn.Module:
        """Back to the model as it came: same class, same keys."""
        return model

    def __and__(self, other: Scope) -> Scope:
        """Weights that both scopes let move."""
        return Both(self, other)

    def __invert__(self) -> Scope:
        """Weights that the scope keeps frozen."""
        return Complement(self)


@dataclass(frozen=True)
class Both(Scope):
    first: Scope
    second: Scope

    def thaws(self, name: str) -> bool:
        return self.first.thaws(name) or self.second.thaws(name)

    def select(self, workbench: Any) -> Mask:
        a, b = self.first.select(workbench), self.second.select(workbench)
        return {name: _and(a[name], b[name]) for name in a}

    def __str__(self) -> str:
        return f"({self.first} & {self.second})"


@dataclass(frozen=True)
class Complement(Scope):
    inner: Scope

    def select(self, workbench: Any) -> Mask:
        return {k: ~m if isinstance(m, Tensor) else not m for k, m in self.inner.select(workbench).items()}

    def __str__(self) -> str:
        return f"~{self.inner}"


@dataclass(frozen=True)
class Everything(Scope):
    def select(self, workbench: Any) -> Mask:
        return {name: p.requires_grad for name, p in workbench.model.named_parameters()}

    def __str__(self) -> str:
        return "all"


@dataclass(frozen=True)
class Layers(Scope):
    patterns: tuple[str, ...]

    def select(self, workbench: Any) -> Mask:
        names = [name for name, _ in workbench.model.named_parameters()]
        mask: Mask = {name: any(fnmatch.fnmatchcase(name, p) for p in self.patterns) for name in names}
        if not any(mask.values()):
            raise BadSetting(
                f"expected a parameter name that matches {', '.join(self.patterns)}, found none."
                f"{nearest(self.patterns[0], names)} Names: {', '.join(names[:6])}, ..."
            )
        return mask

    def __str__(self) -> str:
        return f"layers({','.join(self.patterns)})"


@dataclass(frozen=True)
class LastLayers(Scope):
    """The last `count` modules that own parameters (CF-k, EU-k)."""

    count: int

    def select(self, workbench: Any) -> Mask:
        owners = [m for m in workbench.model.modules() if any(True for _ in m.parameters(recurse=False))]
        # by identity: a tied head's weight is named after the embedding
        chosen = {id(p) for m in owners[-self.count :] for p in m.parameters(recurse=False)}
        return {name: id(p) in chosen for name, p in workbench.model.named_parameters()}

    def __str__(self) -> str:
        return f"last({self.count})"


@dataclass(frozen=True)
class Scored(Scope):
    """The top share of weights by a score, in ONE global ranking over all parameters."""

    density: float
    score: Callable[[Any], Mapping[str, Tensor]]
    label: str = "scored"

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise BadSetting(
                f"expected density in 0..1 (share of weights that may move), found {self.density}; correct it"
            )

    def select(self, workbench: Any) -> Mask:
        return dict(top_share(self.score(workbench), self.density))

    def __str__(self) -> str:
        return f"{self.label}({self.density:g})"


def top_share(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Masks that are True for exactly floor(density * P) weights with the highest scores; ties go by position.

    One global ranking over all tensors, as in SalUn's official mask generation.
    """
    keys = {name: _ordered(score) for name, score in scores.items()}
    count = int(density * sum(key.numel() for key in keys.values()))
    # the count-th largest key by bisection over its 32 bits: no sort, whose indices alone take 8 bytes a weight
    low, high = -(2**31), 2**31
    while high - low > 1:
        middle = (low + high) // 2
        if sum(int((key >= middle).sum()) for key in keys.values()) >= count:
            low = middle
        else:
            high = middle
    masks = {name: key > low for name, key in keys.items()}
    left = count - sum(int(mask.sum()) for mask in masks.values())
    for name, key in keys.items():  # of equal scores, the first ones
        if left <= 0:
            break
        ties = (key.reshape(-1) == low).nonzero()[:left, 0]
        masks[name].view(-1)[ties] = True
        left -= len(ties)
    return masks


def _ordered(score: Tensor) -> Tensor:
    """int32 of the same order as the float32 values."""
    bits = score.detach().float().contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@dataclass(frozen=True)
class Saliency:
    """|sum over batches of grad mean-loss| on the forget split, eval mode (Fan et al., 2310.12508): abs after the sum, so
    weights whose sign cancels score low."""

    objective: Objective | None = None
    on: str = "forget"
    batch_size: int = 256
    clip: float | None = None

    def __call__(self, workbench: Any) -> dict[str, Tensor]:
        total = workbench.gradient(self.on, self.objective, batch_size=self.batch_size, clip=self.clip)
        return {name: g.abs() for name, g in total.items()}


@dataclass(frozen=True)
class Sensitivity:
    """|theta| sum over batches |grad mean-loss| on the forget split, eval mode: the connection sensitivity of Scissorhands
    (2401.06187), with the size taken batch by batch, so that nothing cancels. objective: another (B,) loss than the task's."""

    objective: Objective | None = None
    batches: int = 10
    batch_size: int = 16
    on: str = "forget"

    def __call__(self, workbench: Any) -> dict[str, Tensor]:
        rows, most = workbench.splits[self.on], self.batches * self.batch_size
        rows = rows if len(rows) <= most else rows.sample(most, generator(workbench.seed, "sensitivity"))
        mean = workbench.importance(rows, self.batch_size, power=1, shuffled=True, energy=self.objective)
        weights = dict(workbench.model.named_parameters())
        return {name: size * weights[name].detach().abs() for name, size in mean.items()}


@dataclass(frozen=True)
class FisherRatio:
    """I_forget / I_retain with the squared gradient of each batch mean: how much more a weight matters to the forget rows."""

    batch_size: int = 64

    def __call__(self, workbench: Any) -> dict[str, Tensor]:
        forget = workbench.importance("forget", batch_size=self.batch_size)
        retain = workbench.importance("retain", batch_size=self.batch_size)
        return {name: forget[name] / (retain[name] + 1e-12) for name in forget}


def _random_score(workbench: Any) -> dict[str, Tensor]:
    rng = generator(workbench.seed, "scope", "random")
    return {n: torch.rand(p.shape, generator=rng).to(p.device) for n, p in workbench.model.named_parameters()}


def _magnitude_score(workbench: Any) -> dict[str, Tensor]:
    return {n: p.detach().abs() for n, p in workbench.model.named_parameters()}


@dataclass(frozen=True)
class Unpruned(Scope):
    """Weights that are not exactly zero in matrices and kernels may move; zeros stay zero through any optimizer."""

    def select(self, workbench: Any) -> Mask:
        return {n: (p.detach() != 0) if p.dim() > 1 else True for n, p in workbench.model.named_parameters()}

    def __str__(self) -> str:
        return "unpruned"


def everything() -> Scope:
    """All trainable weights."""
    return Everything()


def layers(*patterns: str) -> Scope:
    """Parameters whose name matches a shell pattern: `layers("classifier.*", "*.bias")`."""
    return Layers(tuple(patterns))


def last_layers(count: int) -> Scope:
    """The last `count` modules that own parameters."""
    return LastLayers(count)


def salient(
    density: float = 0.5, objective: Objective | None = None, on: str = "forget", batch_size: int = 256,
    clip: float | None = None,
) -> Scope:  # fmt: skip
    """The share `density` of weights that the forget loss is most sensitive to (SalUn's mask). clip: largest norm of each
    batch's gradient before it is added."""
    return Scored(density, Saliency(objective, on, batch_size, clip), "salient")


def sensitive(
    density: float = 0.1, objective: Objective | None = None, batches: int = 10, batch_size: int = 16
) -> Scope:
    """The share `density` of weights with the largest connection sensitivity to the forget loss (Scissorhands)."""
    return Scored(density, Sensitivity(objective, batches, batch_size), "sensitive")


def fisher_ratio(density: float = 0.1) -> Scope:
    """The share of weights with the largest ratio of forget to retain importance."""
    return Scored(density, FisherRatio(), "fisher_ratio")


def random_weights(density: float = 0.5) -> Scope:
    """A random share of weights: the control of every score."""
    return Scored(density, _random_score, "random")


def largest(density: float = 0.5) -> Scope:
    """The share of weights with the largest magnitude."""
    return Scored(density, _magnitude_score, "largest")


def unpruned() -> Scope:
    """Keep pruned weights at zero."""
    return Unpruned()


def _and(a: Tensor | bool, b: Tensor | bool) -> Tensor | bool:
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b
