"""Settings that the tuned methods share: type, help and limits in one place. Defaults stand with each method."""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import setting

Lr = Annotated[float, setting("step size", gt=0)]
Epochs = Annotated[int, setting("passes over the data of the terms", ge=1)]
BatchSize = Annotated[int, setting("rows per step", ge=1)]
Momentum = Annotated[float, setting("of SGD", ge=0, lt=1)]
WeightDecay = Annotated[float, setting("L2 weight decay, coupled", ge=0)]
Clip = Annotated[float | None, setting("largest norm of the whole gradient; none: no clipping", gt=0)]
