"""Checks of generative models: what the judges of the case's exam say, and how far images lie from real ones and from before.

Every number stands beside its judges' accuracy on held-out real images, or the name of the features it is made on. See `exam` for
the definitions, `images` for the distances.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from expunge.audits.base import Measured, Measurement, check
from expunge.audits.metrics import images
from expunge.audits.metrics.exam import Exam, Marks
from expunge.audits.subjects import Subjects

SOURCE = "UnlearnCanvas, arXiv 2402.11846"
FACTS: dict[str, Any] = {"kinds": ("diffusion",), "needs": ("exam",)}


def exam_of(subjects: Subjects) -> Exam:
    return subjects.case.exam  # type: ignore[return-value]


def marks_of(subjects: Subjects, subject: str) -> Marks:
    """The judges' marks of a subject's answers, drawn once."""
    return subjects.over("marks", subject, "forget", lambda model, _: exam_of(subjects).marks(model))


def answers_of(subjects: Subjects, subject: str) -> Any:
    return subjects.over("answers", subject, "forget", lambda model, _: exam_of(subjects).answers(model))


def _judged(subjects: Subjects, extra: str = "") -> str:
    """The judges and how far they can be trusted, and how many answers were dropped."""
    told = "; ".join(f"{j.domain} judge {j.accuracy:.3f} on {j.tested}" for j in exam_of(subjects).judges)
    dropped = {s: marks_of(subjects, s).dropped for s in subjects.compared}
    lost = ", ".join(f"{s} {n}" for s, n in dropped.items() if n)
    return "; ".join(filter(None, (extra, told, f"NaN answers dropped: {lost}" if lost else "")))


def _share(subjects: Subjects, read: Callable[[Marks], np.ndarray]) -> Measured | None:
    """The mean in % of each subject's array; None where some subject has no such answers."""
    arrays = {subject: np.asarray(read(marks_of(subjects, subject)), float) for subject in subjects.compared}
    if any(not len(values) for values in arrays.values()):
        return None
    return subjects.proportion(lambda subject: arrays[subject], scale=100.0)


@check("generation_accuracy", unit="%", range=(0.0, 100.0), source=SOURCE, **FACTS)
def generation_accuracy(subjects: Subjects) -> list[Measurement]:
    """UA, IRA, CRA by judges; the worst retained name; for one object in one style FU, and FR of its neighbours and the rest."""
    exam = exam_of(subjects)
    first = marks_of(subjects, "unlearned")
    several = len(exam.target) > 1
    rows: list[tuple[str, str, Callable[[Marks], np.ndarray], dict[str, Any]]] = [
        ("ua", "forget", lambda m: m.unlearned(), {"direction": "match"}),
        ("ua_other_words", "forget", lambda m: m.unlearned(False), {"direction": "match"}),
    ]
    if several:
        rows += [
            ("ra_near", "retain", lambda m: m.kept(list(m.names), m.near & m.plain), {"direction": "higher"}),
            (
                "ra_rest",
                "retain",
                lambda m: m.kept(list(m.names), ~m.near & ~m.asked & m.plain),
                {"direction": "higher"},
            ),
        ]
    else:
        rows.append(("ira", "retain", lambda m: m.kept(m.domains), {"direction": "higher"}))
        if first.other_domains:
            rows.append(("cra", "retain", lambda m: m.kept(m.other_domains), {"direction": "higher"}))
    rows.append(("ra", "retain", lambda m: m.kept(list(m.names)), {"direction": "higher"}))
    rows.append(("leak", "retain", lambda m: m.leaks(), {"direction": "match"}))
    found, told = [], _judged(subjects)
    for name, split, read, facts in rows:
        measured = _share(subjects, read)
        if measured is not None:
            found.append(generation_accuracy.measurement(measured, name=name, split=split, note=told, **facts))
    worst = {subject: marks_of(subjects, subject).worst() for subject in subjects.compared}
    measured = subjects.compute(lambda subject: 100 * worst[subject][1])
    note = "; ".join((f"of the unlearned model: {worst['unlearned'][0]}", told))
    found.append(
        generation_accuracy.measurement(measured, name="worst_retained", split="retain", note=note, direction="higher")
    )
    return found


@check(
    "generation_answers",
    range=(0.0, None),
    source="generation audits card; Selective Amnesia, arXiv 2305.10120",
    **FACTS,
)
def generation_answers(subjects: Subjects) -> list[Measurement]:
    """What the target's prompts yield: mean target probability, entropy of the judge, share that shows the one other name which is
    seen most, share that is like no real image."""
    asked: list[tuple[str, str, str, Callable[[Marks], np.ndarray]]] = [
        ("target_probability", "probability", "forget", lambda m: m.target_probability()[m.asked & m.plain]),
        ("entropy", "nats", "forget", lambda m: m.entropy()[m.asked & m.plain]),
    ]
    yields = {subject: marks_of(subjects, subject).yields() for subject in subjects.compared}
    told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(yields["unlearned"].items())[:5])
    found = []
    for name, unit, split, read in asked:
        measured = subjects.measure(lambda subject, read=read: read(marks_of(subjects, subject)))
        found.append(
            generation_answers.measurement(
                measured, name=name, unit=unit, split=split, note=_judged(subjects, f"the target's prompts now yield {told}"),
                curves={s: {"names": list(y), "shares": list(y.values())} for s, y in yields.items()},
            )
        )  # fmt: skip
    other = _share(subjects, lambda m: m.substitute()[1])
    if other is not None:
        name = marks_of(subjects, "unlearned").substitute()[0] or "nothing"
        found.append(
            generation_answers.measurement(
                other, name="substitute", unit="%", range=(0.0, 100.0), split="forget",
                note=f"share of the target's answers that show what is seen most instead; of the unlearned model: {name}",
            )
        )  # fmt: skip
    for split in ("forget", "retain"):
        wanted = split == "forget"
        shares = _share(subjects, lambda m, wanted=wanted: m.rejected[(m.asked == wanted) & m.plain])
        if shares is not None:
            direction: Any = "match" if wanted else "lower"
            found.append(
                generation_answers.measurement(
                    shares, name="rejected", unit="%", range=(0.0, 100.0), split=split, direction=direction,
                    note="share of answers further from every real image than real ones are",
                )
            )  # fmt: skip
    return found


def _retained(subjects: Subjects, subject: str) -> torch.Tensor:
    """Finite images of all cells but the target's."""
    answers, exam = answers_of(subjects, subject), exam_of(subjects)
    asked = torch.tensor([cell.holds(exam.target) for cell in answers.cells])[answers.cell]
    return answers.images[~asked & answers.finite]


@check("image_distance", direction="lower", source="arXiv 1706.08500, 1801.01401, 1904.06991", kinds=("diffusion",),
       needs=("exam", "exam_reference"))  # fmt: skip
def image_distance(subjects: Subjects) -> list[Measurement]:
    """FID, KID (less what two halves of the real images are apart), precision and recall, on cells and images without the target."""
    exam = exam_of(subjects)
    features, real = exam.features, exam.reference
    assert features is not None and real is not None
    drawn = {subject: _retained(subjects, subject) for subject in subjects.compared}
    about = f"features: {exam.feature_name}; {{}} images against {len(real) // 2} real ones, both without the target"
    found = []
    for name, distance in (("fid", images.fid), ("kid", images.kid)):
        both = {s: images.corrected(distance, features, real, drawn[s]) for s in drawn if len(drawn[s]) > 1}
        measured = subjects.compute(lambda s, both=both: both[s][0] if s in both else float("nan"))
        note = about.format(len(drawn["unlearned"]))
        if "unlearned" in both:
            note += f"; less {both['unlearned'][1]:.3g} between real halves"
        found.append(image_distance.measurement(measured, name=name, split="retain", note=note))
    pairs = {s: images.precision_recall(features, real, drawn[s]) for s in drawn if len(drawn[s]) > images.NEIGHBOURS}
    for place, name in enumerate(("precision", "recall")):
        measured = subjects.compute(lambda s, place=place: pairs[s][place] if s in pairs else float("nan"))
        found.append(
            image_distance.measurement(
                measured, name=name, split="retain", direction="higher", range=(0.0, 1.0),
                note=f"features: {exam.feature_name}; k = {images.NEIGHBOURS}",
            )
        )  # fmt: skip
    return found


@check("image_drift", source="generation audits card (LPIPS or feature distance)", kinds=("diffusion",),
       needs=("exam", "exam_features"))  # fmt: skip
def image_drift(subjects: Subjects) -> list[Measurement]:
    """Feature distance of images under the same noise: to the original on what must stay, to the retrained model on the target.

    1 is the mean distance of the original's images of one cell under different noise.
    """
    exam = exam_of(subjects)
    features = exam.features
    assert features is not None
    sets = {subject: answers_of(subjects, subject) for subject in subjects.compared}
    asked = torch.tensor([cell.holds(exam.target) for cell in sets["original"].cells])[sets["original"].cell]
    unit = _unit(features, sets["original"])
    found = []
    for name, base, where, split in (
        ("drift", "original", ~asked, "retain"), ("distance_to_retrained", "retrained", asked, "forget")
    ):  # fmt: skip
        if base not in sets:
            continue
        rows = where & sets[base].finite

        def distances(subject: str, base: str = base, rows: torch.Tensor = rows) -> np.ndarray:
            both = rows & sets[subject].finite
            if not bool(both.any()):
                return np.array([np.nan])
            return (
                images.feature_distance(features, sets[subject].images[both], sets[base].images[both]) / unit
            ).numpy()

        measured = subjects.measure(distances)
        note = f"features: {exam.feature_name}; 1 = the original under other noise"
        direction: Any = "lower"
        found.append(
            image_drift.measurement(measured, name=name, split=split, direction=direction, range=(0.0, None), note=note)
        )
    return found


def _unit(features: Any, answers: Any) -> float:
    """Mean feature distance of a cell's images to its next image, under another seed; 1 where there is one seed."""
    kept = answers.finite_only()
    with torch.no_grad():
        found = features(kept.images).double()
    same = kept.cell[1:] == kept.cell[:-1]
    apart = (found[1:] - found[:-1]).norm(dim=1)[same]
    return float(apart.mean()) if len(apart) and float(apart.mean()) > 0 else 1.0


@check("clip_score", unit="100 cos", direction="higher", range=(0.0, 100.0), source="arXiv 2104.08718, by torchmetrics",
       kinds=("diffusion",), needs=("exam", "exam_clip"))  # fmt: skip
def clip_score(subjects: Subjects) -> list[Measurement]:
    """Mean of max(100 cos(image, prompt), 0) on what must stay, and on the target's prompts, by a CLIP folder of yours."""
    exam, found = exam_of(subjects), []
    for split in ("retain", "forget"):

        def score(subject: str, split: str = split) -> float:
            answers = answers_of(subjects, subject).finite_only()
            asked = torch.tensor([cell.holds(exam.target) for cell in answers.cells])[answers.cell]
            rows = asked if split == "forget" else ~asked
            prompts = [str(answers.cells[c].asks) for c in answers.cell[rows].tolist()]
            return images.clip_score(answers.images[rows], prompts, exam.clip)

        direction: Any = "match" if split == "forget" else "higher"
        found.append(clip_score.measurement(subjects.compute(score), split=split, direction=direction))
    return found


@check(
    "storage",
    unit="MB",
    direction="lower",
    range=(0.0, None),
    source=SOURCE,
    kinds=("diffusion",),
)
def storage(subjects: Subjects) -> list[Measurement]:
    """What has to be kept beside the original for this request: the tensors that differ from it."""
    before = subjects.model("original").state_dict()

    def megabytes(subject: str) -> float:
        own = subjects.model(subject).state_dict()
        differ = [
            t for n, t in own.items() if n not in before or t.shape != before[n].shape or not torch.equal(t, before[n])
        ]
        return sum(t.numel() * t.element_size() for t in differ) / 2**20

    return [storage.measurement(subjects.compute(megabytes), split="")]
