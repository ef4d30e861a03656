"""The embedded generators' judges, trained on MiniCanvas's real training images and tried on its held-out ones.

    judges = canvas_judges()      # .style, .object: who judges the text toy; .features: for FID and KID
    judges = digit_judges()       # .digit: a support vector machine, who judges the class toy; .features

`features` is a network of another seed than any judge, so what fools a judge need not move the distances. Networks are kept
by content; the machine is trained anew in a fraction of a second.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from expunge.audits.metrics.judges import Features, Judge, Reject, SmallNet, cnn_judge, fit_net, svm_judge
from expunge.benchmarks.canvas import digit_images, mini_canvas
from expunge.benchmarks.nano import cache_home
from expunge.files import digest_bytes, write_atomic

DIGITS, DIGITS_FEATURES = {"steps": 600, "width": 32}, {"steps": 400, "width": 16}
PHOTOGRAPHS = {"steps": 8000, "width": 64, "augment": True}
"""CIFAR-10 needs an accelerator and a lower floor than digits."""
JUDGE, FEATURES = 0, 1
"""Seeds: the judges' and the features'."""


@dataclass(frozen=True)
class CanvasJudges:
    style: Judge
    object: Judge
    features: Features


@dataclass(frozen=True)
class DigitJudges:
    digit: Judge
    features: Features


@cache
def canvas_judges(
    size: int = 8, objects: str = "digits", rows: int | None = None, folder: Path | None = None
) -> CanvasJudges:
    """Judges of the text toy's images (N, 3, size, size). rows: of plain training images, the first ones alone."""
    train, test = mini_canvas("train", size, objects, rows), mini_canvas("test", size, objects)
    settings = DIGITS if objects == "digits" else PHOTOGRAPHS
    kinds = len(train.object_names)
    of_features = DIGITS_FEATURES if objects == "digits" else PHOTOGRAPHS
    features = Features(kept_net(train.images, train.objects, kinds, FEATURES, folder, **of_features))
    reject = Reject.fitted(features, train.images, test.images)
    style_net = kept_net(train.images, train.styles, len(train.style_names), JUDGE, folder, steps=300, width=16)
    object_net = kept_net(train.images, train.objects, kinds, JUDGE, folder, **settings)
    return CanvasJudges(
        cnn_judge("style", train.style_names, style_net, reject, test.images, test.styles),
        cnn_judge("object", train.object_names, object_net, reject, test.images, test.objects), features,
    )  # fmt: skip


@cache
def digit_judges(size: int = 8, folder: Path | None = None) -> DigitJudges:
    """The judge of the class toy's images (N, 1, size, size)."""
    (images, labels), (test, test_labels) = digit_images("train", size), digit_images("test", size)
    features = Features(kept_net(images, labels, 10, FEATURES, folder, **DIGITS_FEATURES))
    reject = Reject.fitted(features, images, test)
    names = tuple(str(digit) for digit in range(10))
    return DigitJudges(svm_judge("digit", names, images, labels, reject, test, test_labels), features)


def kept_net(
    images: Tensor, labels: Tensor, classes: int, seed: int, folder: Path | None = None, **settings: Any
) -> SmallNet:
    """`fit_net`, kept under a digest of images, labels and settings; trained on the accelerator when there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = [digest_bytes(part.numpy().tobytes()) for part in (images, labels)]
    key = digest_bytes(json.dumps([data, classes, seed, settings], sort_keys=True))[:16]
    path = Path(folder or cache_home()) / "generation" / f"judge-{key}.safetensors"
    if not path.is_file():
        net = fit_net(images, labels, classes, seed, device=device, **settings).cpu()
        write_atomic(path, save({name: value.contiguous() for name, value in net.state_dict().items()}))
    net = SmallNet(images.shape[1], images.shape[-1], classes, settings["width"])
    net.load_state_dict(load_file(path))
    return net.to(device).eval().requires_grad_(False)
