"""What judges see in what a class-conditional generator draws for its classes, from the same latents for every model.

    class_probability = mean probability of the forgotten class, of images drawn for it
    class_entropy     = mean entropy in nats of the judge's answer to them: log K where it cannot say what they show
    kept_accuracy     = share of the other classes' images that are judged to show theirs
    class_rejected    = share of the forgotten class's images that are like no real one, where the judge can tell

The first two are Selective Amnesia's numbers (2305.10120, its MNIST autoencoder: 0.058 and 2.19 nats). An entropy is as much the
judge's as the images': a support vector machine is certain of a grey image too. The judge's held-out accuracy stands beside them.

    case = Case(model, data, requests.label(0), task="vae", exam=ClassExam(judge, target=0, classes=10))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.audits.base import Measurement, check
from expunge.audits.metrics.judges import FLOOR, require
from expunge.audits.subjects import Subjects
from expunge.cases.feedback import Judge, judge_digest, judged
from expunge.errors import BadSetting
from expunge.tasks.vae import Vae

FACTS: dict[str, Any] = {
    "kinds": ("vae",),
    "needs": ("retrained", "exam"),
    "source": "Selective Amnesia, arXiv 2305.10120, section 4.1",
}


@dataclass(frozen=True)
class ClassAnswers:
    """asked: (n,) the class that each image was drawn for. probabilities: (n, K) of the judge. accepted: (n,) finite, and like a real
    image where the judge can tell."""

    asked: np.ndarray
    probabilities: np.ndarray
    accepted: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """(n,) whether an image is judged to show its class."""
        return self.probabilities.argmax(1) == self.asked

    @property
    def entropy(self) -> np.ndarray:
        """(n,) in nats."""
        p = self.probabilities
        return -(p * np.log(np.clip(p, 1e-12, None))).sum(1)

    def of(self, rows: np.ndarray) -> ClassAnswers:
        return ClassAnswers(self.asked[rows], self.probabilities[rows], self.accepted[rows])


@dataclass(frozen=True)
class ClassExam:
    """Who judges what a class-conditional generator draws. target: the class to go. classes: how many there are. each: images of a
    class, whose latents are those of `seed` for every model. view: from the model's images to what the judge takes (default: as they
    are). A judge's `accuracy`, where it has one, must reach `floor`."""

    judge: Judge
    target: int
    classes: int
    each: int = 200
    seed: int = 0
    view: Callable[[Tensor], Tensor] | None = None
    floor: float = FLOOR
    task: Vae = field(default_factory=Vae)

    def __post_init__(self) -> None:
        if not 0 <= self.target < self.classes or self.classes < 2:
            raise BadSetting(
                f"expected the target among the classes 0..{self.classes - 1} and another beside it, found {self.target}; correct it"
            )
        if hasattr(self.judge, "accuracy"):
            require(self.judge, floor=self.floor)  # type: ignore[arg-type]

    def answers(self, model: Any) -> ClassAnswers:
        """Every class, `each` images, judged."""
        asked = torch.arange(self.classes).repeat_interleave(self.each)
        made = self.task.sample(model, asked, self.seed)
        finite = torch.isfinite(made.flatten(1)).all(1)
        made[~finite] = 0
        seen = made if self.view is None else self.view(made)
        turns_away = getattr(self.judge, "rejected", None)
        accepted = finite if turns_away is None else finite & ~torch.as_tensor(turns_away(seen))
        return ClassAnswers(asked.numpy(), judged(self.judge, seen).numpy(), accepted.numpy())

    def about(self, model: Any) -> ClassAnswers:
        """What was drawn for the target."""
        found = self.answers(model)
        return found.of(found.asked == self.target)

    def recalled(self, model: Any) -> np.ndarray:
        """(n,) the verdict's forget score: 1 where an image for the target shows it and is like a real one."""
        found = self.about(model)
        return (found.right & found.accepted).astype(np.float64)

    def useful(self, model: Any) -> np.ndarray:
        """(n,) the verdict's utility: 1 where an image for another class shows that and is like a real one."""
        found = self.answers(model)
        rest = found.of(found.asked != self.target)
        return (rest.right & rest.accepted).astype(np.float64)

    def describe(self) -> dict[str, Any]:
        """What records carry beside every number."""
        return {
            "target": self.target, "classes": self.classes, "each": self.each, "seed": self.seed,
            "judge": judge_digest(self.judge), "judge_accuracy": getattr(self.judge, "accuracy", None),
        }  # fmt: skip

    def __str__(self) -> str:
        accuracy = getattr(self.judge, "accuracy", None)
        told = f", {accuracy:.4f} on held-out real images" if accuracy is not None else ""
        return f"{self.each} images a class, judge {judge_digest(self.judge)[:12]}{told}"


def _answers(subjects: Subjects, subject: str) -> ClassAnswers:
    exam = subjects.case.exam
    if not isinstance(exam, ClassExam):
        raise BadSetting(
            f"expected a ClassExam for a case of vae, found {type(exam).__name__}; pass Case(exam=ClassExam(judge, target, classes))"
        )
    return subjects.over("class answers", subject, "forget", lambda model, _: exam.answers(model))


@check("class_samples", range=(0.0, None), direction="match", **FACTS)
def class_samples(subjects: Subjects) -> list[Measurement]:
    """What the judge sees in images drawn for the forgotten class, and in those of the others."""
    exam: Any = subjects.case.exam

    def about(subject: str, kept: bool = False) -> ClassAnswers:
        found = _answers(subjects, subject)
        return found.of((found.asked != exam.target) if kept else (found.asked == exam.target))

    note = str(exam)
    probability = subjects.measure(lambda s: about(s).probabilities[:, exam.target])
    entropy = subjects.measure(lambda s: about(s).entropy)
    rejected = subjects.proportion(lambda s: about(s).accepted, flip=True)
    kept = subjects.proportion(lambda s: about(s, kept=True).right, scale=100.0)
    share = {"split": "forget", "note": note, "range": (0.0, 1.0)}
    return [
        class_samples.measurement(probability, name="class_probability", **share),
        class_samples.measurement(entropy, name="class_entropy", unit="nats", split="forget", note=note),
        class_samples.measurement(rejected, name="class_rejected", **share),
        class_samples.measurement(
            kept, name="kept_accuracy", unit="%", split="retain", direction="higher", range=(0.0, 100.0), note=note
        ),
    ]
