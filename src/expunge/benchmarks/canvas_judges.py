"""The embedded generators' judges, trained on MiniCanvas's real training images and tried on its held-out ones.

    judges = canvas_judges()      # .style, .object: who judges the text toy; .features: for FID and KID
    judges = digit_judges()       # .digit: a support vector machine, who judges the class toy; .features
    quality(model, judges)        # how well a base model draws
    require_original(exam, model) # raises OriginalBelowFloor where it draws too badly for any comparison to count (BASE)

`features` is a network of another seed than any judge, so what fools a judge need not move the distances. Networks are kept
by content; the machine is trained anew in a fraction of a second.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from expunge.audits.metrics.exam import Exam
from expunge.audits.metrics.judges import Features, Judge, Reject, SmallNet, cnn_judge, fit_net, svm_judge
from expunge.benchmarks.canvas import OBJECTS, digit_images, mini_canvas
from expunge.benchmarks.trained import cache_home
from expunge.errors import OriginalBelowFloor
from expunge.files import digest_bytes, write_atomic
from expunge.tasks.sampling import Sampling, sample

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


BASE = {"digit": 0.9, "style": 0.85, "object": 0.85}
"""Least judged accuracy of a base model (testbed card's gate), the class toy's of every class; 0.85 in any other domain."""
SAMPLING = {"class": Sampling(25, 1.0, "ddpm"), "text": Sampling(20, 2.0)}


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


@dataclass(frozen=True)
class Quality:
    """accuracy: by domain, mean over cells; worst: of the worst class of each domain. rejected: share like no real image,
    NaN counted in. All in [0, 1]."""

    accuracy: dict[str, float]
    worst: dict[str, float]
    rejected: float
    images: int

    def __str__(self) -> str:
        said = [f"{d} {self.accuracy[d]:.3f} (worst {self.worst[d]:.3f}, needs {BASE[d]:.2f})" for d in self.accuracy]
        return f"{'; '.join(said)}; like no real image {self.rejected:.3f}; {self.images} images"


def quality(
    model: Any, judges: CanvasJudges | DigitJudges, each: int = 5, seed: int = 0, without: str | int | None = None,
    sampling: Sampling | None = None,
) -> Quality:  # fmt: skip
    """Judged accuracy of a Denoiser's own images, `each` for every class, or for every style x object by its first word.

    without: what the model was never shown, and is not asked for.
    """
    if isinstance(judges, DigitJudges):
        asked, domains = [(digit,) for digit in range(10) if digit != without for _ in range(each)], (judges.digit,)
        condition = model.conditions.of([digit for (digit,) in asked])
    else:
        canvas = mini_canvas("test", objects=_objects(judges), rows=1000)
        canvas = canvas if without is None else canvas.without(str(without))
        asked, domains = [cell for cell in canvas.cells() for _ in range(each)], (judges.style, judges.object)
        condition = model.conditions.of([canvas.caption(*cell) for cell in asked])
    drawn = sample(model, condition, sampling or SAMPLING[model.kind], seeds=seed)
    accuracy, worst = {}, {}
    for column, judge in enumerate(domains):
        wanted = torch.tensor([cell[column] for cell in asked])
        right = (judge(drawn.images).argmax(1) == wanted) & drawn.finite
        accuracy[judge.domain] = float(right.float().mean())
        worst[judge.domain] = min(float(right[wanted == one].float().mean()) for one in wanted.unique())
    rejected = domains[0].rejected(drawn.images) | ~drawn.finite
    return Quality(accuracy, worst, float(rejected.float().mean()), len(asked))


def require_original(exam: Exam, model: Any, floor: float | None = None) -> dict[str, float]:
    """Judged accuracy in [0, 1] of the original's own answers, on the target and in each domain on all else (1 - UA, IRA and CRA; the
    worst class where there is one domain); raises OriginalBelowFloor. floor: least of each; None: `BASE`; 0 lets every model pass."""

    def least(*domains: str) -> float:
        return min(BASE.get(domain, 0.85) for domain in domains) if floor is None else floor

    marks, target = exam.marks(model), " ".join(exam.target.values())
    found = {target: (1 - float(np.mean(marks.unlearned())), least(*exam.target))}
    if marks.other_domains:
        found |= {f"{d} of the rest": (float(np.mean(marks.kept([d]))), least(d)) for d in marks.names}
    else:
        name, share = marks.worst()
        found[f"{name}, the worst of the rest"] = (share, least(*marks.names))
    low = [f"{share:.3f} on {what} (needs {need:.2f})" for what, (share, need) in found.items() if not share >= need]
    if low and floor != 0:
        raise OriginalBelowFloor(
            f"expected an original that draws what it is asked, by the judges of this table, found accuracy {', '.join(low)}; train it "
            "longer, or set the floor to 0 on purpose, as small test models do"
        )
    return {what: share for what, (share, _) in found.items()}


def _objects(judges: CanvasJudges) -> str:
    return next(name for name, words in OBJECTS.items() if words == judges.object.names)


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
