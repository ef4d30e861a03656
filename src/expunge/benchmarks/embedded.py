"""The embedded diffusion case of a request in words or a class: model, images, judges, and models that never saw it.

    case = Embedded(concept="red").case               # the text toy on MiniCanvas
    case = Embedded(label=3).case                     # the class toy on digits
    audit(case, outcome, gold=Embedded(label=3).retrained(), floor=Embedded(label=3).retrained(second=True))

What `expunge run` takes where a diffusion case names no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from expunge.audits.metrics.answer_set import Cell
from expunge.audits.metrics.exam import Exam
from expunge.audits.metrics.judges import to_uint8
from expunge.benchmarks.canvas import digit_images
from expunge.benchmarks.canvas_judges import digit_judges
from expunge.benchmarks.image_models import SMALL, class_toy
from expunge.benchmarks.trained import cache_home
from expunge.benchmarks.unlearncanvas import Bench, mini
from expunge.cases import Case, requests
from expunge.cases.pictures import pictures
from expunge.errors import BadRequest
from expunge.tasks.denoiser import Denoiser
from expunge.tasks.sampling import Sampling

SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Embedded:
    """One of concept and label. settings: of the toy, and `small` (the tests' size), `rows` (images per split, concept only), `answers`
    (seeds of the exam, 4) and `sampling_steps`."""

    concept: str | None = None
    label: int | None = None
    name: str = "embedded"
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def toy(self) -> dict[str, Any]:
        own = {k: v for k, v in self.settings.items() if k not in ("small", "rows", "answers", "sampling_steps")}
        if "channels" in own:
            own["channels"] = tuple(own["channels"])
        return {**(SMALL if self.settings.get("small") else {}), **own}

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(int(self.settings.get("answers", len(SEEDS)))))

    @property
    def bench(self) -> Bench:
        rows = {"rows": self.settings["rows"]} if "rows" in self.settings else {}
        found = mini(bool(self.settings.get("small")), **rows, **self.toy)
        steps = int(self.settings.get("sampling_steps", found.sampling.steps))
        return replace(found, answer_seeds=self.seeds, sampling=Sampling(steps, found.sampling.guidance))

    @property
    def case(self) -> Case:
        if self.concept is not None:
            return replace(self.bench.case(self.concept, self.seed), name=self.name)
        if self.label is None or not 0 <= self.label < 10:
            raise BadRequest(f"expected a digit 0 to 9 to forget, found {self.label}; the embedded model draws digits")
        model = Denoiser(class_toy(self.seed, **self.toy))
        data, test = (
            pictures(model, images, labels=labels)
            for images, labels in (digit_images(split, self.toy.get("size", 8)) for split in ("train", "test"))
        )
        exam = self.exam()
        return Case(
            model, data, requests.label(self.label), task="diffusion", test=test, exam=exam, name=self.name, seed=self.seed,
            notes={"exam": exam.describe()},
        )  # fmt: skip

    def exam(self) -> Exam:
        """Ten classes, the support vector machine, and digits without the class as reference; guidance of the class toy's card."""
        size = self.toy.get("size", 8)
        judges = digit_judges(size)
        images, labels = digit_images("test", size)
        return Exam(
            tuple(Cell(c, {"digit": str(c)}) for c in range(10)), {"digit": str(self.label)}, (judges.digit,), self.seeds,
            Sampling(int(self.settings.get("sampling_steps", 25)), 1.0, "ddpm"), judges.features, "digits CNN, 64-d, own seed",
            to_uint8(images[labels != self.label]), cache=cache_home() / "generation" / "answers",
        )  # fmt: skip

    def retrained(self, second: bool = False) -> Denoiser:
        """The same recipe without the target, in images and in captions; second: with another seed."""
        seed = self.seed + int(second)
        if self.concept is None:
            return Denoiser(class_toy(seed, exclude=self.label, **self.toy))
        found = self.bench.retrained(seed, self.concept)
        if found is None:
            raise BadRequest(
                f"expected one style or one object to forget, found '{self.concept}', for which no retrained model is made; give "
                "a gold of your own, or measure it by `expunge bench canvas`"
            )
        return found
