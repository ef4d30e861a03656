"""What a judge sees in a generator's samples: how much of the target is gone, and whether the rest is still all there.

    PUL = 100 (n_before - n_after) / n_before        n: samples judged to show the target, of the same latents (2309.14054)
    diversity = entropy of the judged classes but the target's, over its largest value; and the smallest of their shares
    FID, Ret-FID = Fréchet distance to real images, with and without the target's

A generator that draws one digit for ever has a PUL of 100, so PUL stands beside the diversity: below 0.8 of the largest entropy, or
with a class below 3 %, it has collapsed and has not unlearned. The judge that filtered the samples a method learned from may not
score them.

    case = feedback(pair, filter_judge, forget=7, exam=GanExam(score_judge, 7, features=features, reference=real, labels=classes))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audits.base import Measured, Measurement, check
from expunge.audits.metrics import images
from expunge.audits.metrics.judges import FLOOR, require, to_uint8
from expunge.audits.subjects import Subjects
from expunge.cases.feedback import Judge, judge_digest, judged, verify_independent
from expunge.errors import BadSetting
from expunge.tasks.gan import Gan, frechet

SOURCE = "Adapt-then-Unlearn, arXiv 2309.14054"
LEAST_ENTROPY, LEAST_SHARE = 0.8, 0.03
FACTS: dict[str, Any] = {"kinds": ("gan",), "needs": ("retrained", "exam"), "source": SOURCE}


def pul(before: np.ndarray, after: np.ndarray) -> float:
    """Percentage of unlearning: (n,) bool each, whether a latent's image shows the target before and after; NaN where none did
    before. Negative where there are more of them than before."""
    if len(before) != len(after):
        raise BadSetting(
            f"expected samples of the same latents, found {len(before)} before and {len(after)} after; draw as many"
        )
    count = int(np.sum(before))
    return 100.0 * (count - int(np.sum(after))) / count if count else float("nan")


@dataclass(frozen=True)
class Diversity:
    """shares: class -> share of the samples that do not show the target. entropy: over its largest value, 1 where all classes
    are drawn alike."""

    shares: Mapping[int, float]
    entropy: float

    @property
    def least(self) -> float:
        return min(self.shares.values())

    @property
    def collapsed(self) -> bool:
        return not (self.entropy >= LEAST_ENTROPY and self.least >= LEAST_SHARE)


def diversity(classes: np.ndarray, count: int, target: int | None = None) -> Diversity:
    """Of judged classes (n,) among `count`; the target's samples are left out. No sample left is a collapse (entropy 0)."""
    kept = [k for k in range(count) if k != target]
    amounts = np.array([np.sum(classes == k) for k in kept], dtype=float)
    shares = amounts / amounts.sum() if amounts.sum() else amounts
    bits = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    return Diversity(
        dict(zip(kept, shares.tolist(), strict=True)), float(bits / math.log(len(kept))) if len(kept) > 1 else 1.0
    )


@dataclass(frozen=True)
class GanExam:
    """What a generator is judged by. target: the judge's class. count, seed: of the latents, the same for every model.

    reference, labels: real images and their classes, of which the target's are left out for Ret-FID. features: network of FID and
    KID, named feature_name beside every number; none: the task's own features. A judge with a `rejected` turns away what is like
    no real image; its `accuracy` must reach `floor`.
    """

    judge: Judge
    target: int
    count: int = 2000
    seed: int = 0
    reference: Tensor | None = None
    labels: Tensor | None = None
    features: nn.Module | None = None
    feature_name: str = "pixels"
    floor: float = FLOOR
    task: Gan = field(default_factory=Gan)

    def __post_init__(self) -> None:
        if hasattr(self.judge, "accuracy"):
            require(self.judge, floor=self.floor)  # type: ignore[arg-type]

    def samples(self, model: Any) -> tuple[Tensor, np.ndarray]:
        """Images (n, ...) of the exam's latents, those that are not finite as zeros, and (n,) which are finite."""
        made = self.task.sample(model, self.count, self.seed)
        finite = torch.isfinite(made.flatten(1)).all(1)
        made[~finite] = 0
        return made, finite.numpy()

    def classes(self, samples: tuple[Tensor, np.ndarray]) -> np.ndarray:
        """(n,) judged classes; -1 where a sample is not finite."""
        made, finite = samples
        return np.where(finite, judged(self.judge, made).argmax(1).numpy(), -1)

    def accepted(self, samples: tuple[Tensor, np.ndarray]) -> np.ndarray:
        """(n,) finite, and like a real image where the judge can tell."""
        made, finite = samples
        rejected = getattr(self.judge, "rejected", None)
        return finite if rejected is None else finite & ~np.asarray(rejected(made))

    def recalled(self, model: Any) -> np.ndarray:
        """(n,) the verdict's forget score: 1 where a sample shows the target and is like a real image."""
        samples = self.samples(model)
        return ((self.classes(samples) == self.target) & self.accepted(samples)).astype(np.float64)

    def useful(self, model: Any) -> np.ndarray:
        """(n,) the verdict's utility: 1 where a sample is like a real image."""
        return self.accepted(self.samples(model)).astype(np.float64)

    @property
    def known(self) -> int:
        """How many classes the judge tells apart."""
        names = getattr(self.judge, "names", None)
        if names is not None:
            return len(names)
        sample = self.reference[:2] if self.reference is not None else None
        if sample is None:
            raise BadSetting(
                "expected a judge with names, or reference images to ask it about, found neither; pass one"
            )
        found = judged(self.judge, sample).shape[1]
        return max(found, int(self.labels.max()) + 1) if self.labels is not None else found

    def distance(self, samples: tuple[Tensor, np.ndarray], retained: bool) -> float:
        """Fréchet distance to the reference, without the target's images where `retained`."""
        if self.reference is None or (retained and self.labels is None):
            raise BadSetting(
                "expected real images with their classes for FID and Ret-FID, found none; pass reference=, labels="
            )
        real = self.reference if not retained else self.reference[self.labels != self.target]  # type: ignore[index]
        made = samples[0][torch.from_numpy(samples[1])]
        if self.features is None:
            return frechet(self.task.compared(made), self.task.compared(real))
        return images.fid(self.features, to_uint8(real), to_uint8(made))

    def describe(self) -> dict[str, Any]:
        """What records carry beside every number."""
        accuracy = getattr(self.judge, "accuracy", None)
        return {
            "target": self.target, "samples": self.count, "seed": self.seed, "judge": judge_digest(self.judge),
            "judge_accuracy": accuracy, "features": self.feature_name,
        }  # fmt: skip

    def __str__(self) -> str:
        accuracy = getattr(self.judge, "accuracy", None)
        told = f", {accuracy:.4f} on held-out real images" if accuracy is not None else ""
        return f"{self.count} samples, judge {judge_digest(self.judge)[:12]}{told}, features: {self.feature_name}"


def exam_of(subjects: Subjects) -> GanExam:
    exam = subjects.case.exam
    if not isinstance(exam, GanExam):
        raise BadSetting(
            f"expected a GanExam for a case of gan, found {type(exam).__name__}; pass Case(exam=GanExam(judge, target))"
        )
    verify_independent(exam.judge, subjects.case.notes.get("feedback", {}))
    return exam


def _drawn(subjects: Subjects, subject: str) -> tuple[Tensor, np.ndarray]:
    return subjects.over("gan samples", subject, "forget", lambda model, _: exam_of(subjects).samples(model))


def _classes(subjects: Subjects, subject: str) -> np.ndarray:
    exam = exam_of(subjects)
    return subjects.memo(("gan classes", subject), lambda: exam.classes(_drawn(subjects, subject)))


@check("pul", unit="%", range=(None, 100.0), direction="match", **FACTS)
def percentage_of_unlearning(subjects: Subjects) -> list[Measurement]:
    """How much of the target is gone from samples of the same latents, and its share among them."""
    exam = exam_of(subjects)
    shown = {subject: _classes(subjects, subject) == exam.target for subject in subjects.compared}
    before = shown["original"]
    measured = subjects.measure(
        lambda subject: np.stack([before, shown[subject]], 1).astype(float),
        lambda rows: np.nan_to_num(pul(rows[:, 0], rows[:, 1])),
    )
    share = subjects.proportion(lambda subject: shown[subject], scale=100.0)
    return [
        percentage_of_unlearning.measurement(measured, split="forget", note=str(exam)),
        percentage_of_unlearning.measurement(
            share, name="target_share", split="forget", note=str(exam), range=(0.0, 100.0)
        ),
    ]


@check("sample_diversity", range=(0.0, 1.0), direction="higher", **FACTS)
def sample_diversity(subjects: Subjects) -> list[Measurement]:
    """Entropy of the judged classes that remain, over its largest value, and the smallest of their shares: mode collapse shows."""
    exam = exam_of(subjects)
    found = {s: diversity(_classes(subjects, s), exam.known, exam.target) for s in subjects.compared}
    gone = ", ".join(s for s in subjects.compared if found[s].collapsed)
    note = (
        f"collapsed: {gone}"
        if gone
        else f"none below {LEAST_ENTROPY} of the largest entropy or {LEAST_SHARE:.0%} of a class"
    )
    curves = {s: {"classes": list(d.shares), "shares": list(d.shares.values())} for s, d in found.items()}
    return [
        sample_diversity.measurement(
            subjects.compute(lambda s: found[s].entropy), split="retain", note=note, curves=curves
        ),
        sample_diversity.measurement(
            subjects.compute(lambda s: found[s].least), name="least_share", split="retain", note=note
        ),
    ]


@check(
    "sample_distance", range=(0.0, None), direction="lower", kinds=("gan",), needs=("retrained", "exam"), source=SOURCE
)
def sample_distance(subjects: Subjects) -> list[Measurement]:
    """FID against all real images and Ret-FID against those without the target, on the exam's features."""
    exam = exam_of(subjects)
    if exam.reference is None:
        return []
    found = []
    for name, retained in (("fid", False), ("ret_fid", True)):
        if retained and exam.labels is None:
            continue
        measured: Measured = subjects.compute(lambda s, r=retained: exam.distance(_drawn(subjects, s), r))
        found.append(
            sample_distance.measurement(measured, name=name, split="retain", note=f"features: {exam.feature_name}")
        )
    return found
