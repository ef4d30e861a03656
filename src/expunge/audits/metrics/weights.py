"""Distances between weights: weak evidence for approximate methods, a proof for exact ones.

    weight distance = || theta_U - theta_R || / || theta_R' - theta_R ||      R' a second retrained seed

Two retrained models lie far apart (permuted units alone do that), which is why the distance is given in units of
theirs: near 1 means "as far as another retraining", 0 means equal. For exact methods `weight_difference` is the proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expunge.audits.base import Measurement, check

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

Weights = Mapping[str, Tensor]


def layer_distances(first: Weights, second: Weights) -> dict[str, float]:
    """Layer (name up to the last dot) -> Euclidean distance over its floating-point parameters, in float64."""
    squares: dict[str, float] = {}
    for name, value in first.items():
        if name in second and value.is_floating_point() and value.shape == second[name].shape:
            layer = name.rpartition(".")[0] or name
            gap = (value.detach().cpu().double() - second[name].detach().cpu().double()).square().sum()
            squares[layer] = squares.get(layer, 0.0) + float(gap)
    return {layer: total**0.5 for layer, total in squares.items()}


def weight_distance(first: Weights, second: Weights) -> float:
    """Euclidean distance over all floating-point parameters."""
    return sum(value**2 for value in layer_distances(first, second).values()) ** 0.5


def relative_difference(first: Weights, second: Weights) -> float:
    """max over tensors of max|a - b| / max|b|; 0.0 only if all are equal byte for byte, infinity if names or shapes
    differ."""
    if first.keys() != second.keys() or any(first[name].shape != second[name].shape for name in first):
        return float("inf")
    worst = 0.0
    for name, value in first.items():
        a, b = value.detach().cpu(), second[name].detach().cpu()
        if a.numel() and not torch.equal(a, b):
            gap, scale = float((a.double() - b.double()).abs().max()), float(b.double().abs().max())
            worst = max(worst, gap / scale if scale > 0 else float("inf"))
    return worst


def _parameters(subjects: Subjects, subject: str) -> Weights:
    return dict(subjects.model(subject).named_parameters())


@check(
    "weight_distance",
    unit="distances of two retrained",
    direction="match",
    range=(0.0, None),
    needs=("retrained", "floor"),
    source="audits card, 4; weak evidence only",
)
def distance(subjects: Subjects) -> list[Measurement]:
    """Distance of the weights from the retrained model's, over that of two retrained models; by layer in `curves`."""
    retrained, second = _parameters(subjects, "retrained"), _parameters(subjects, "floor")
    whole, layers = weight_distance(second, retrained), layer_distances(second, retrained)
    measured = subjects.compute(
        lambda subject: _ratio(weight_distance(_parameters(subjects, subject), retrained), whole)
    )
    by_layer = {
        subject: {
            layer: _ratio(value, layers.get(layer, 0.0))
            for layer, value in layer_distances(_parameters(subjects, subject), retrained).items()
        }
        for subject in ("original", "unlearned")
    }
    return [
        distance.measurement(measured, curves={"layers": by_layer}, note="weak evidence; see js_divergence and klom")
    ]


@check(
    "weight_difference",
    unit="relative",
    direction="lower",
    range=(0.0, None),
    needs=("retrained",),
    source="audits card, 7: exact methods",
)
def weight_difference(subjects: Subjects) -> list[Measurement]:
    """Largest relative difference of any weight tensor from the retrained model's; 0 means equal byte for byte."""
    retrained = subjects.model("retrained").state_dict()
    measured = subjects.compute(lambda subject: relative_difference(subjects.model(subject).state_dict(), retrained))
    return [weight_difference.measurement(measured, note="a proof for exact methods at 0; says nothing about others")]


def _ratio(value: float, unit: float) -> float:
    return value / unit if unit > 0 else (0.0 if value == 0 else float("inf"))
