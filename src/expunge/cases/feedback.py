"""Forget and retain data where the training data is gone: the model's own samples, split by a judge.

    table, told = own_samples(pair, judge, forget=7, samples=5000)       # inputs, latents, labels (what the judge saw)
    case = feedback(pair, judge, forget=7)                               # forget: judged 7; retain: all others

The judge that filters must not be the judge that scores (2309.14054): the case keeps the filter's digest in its notes, and the
audits refuse a scoring judge of the same digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expunge.cases import requests
from expunge.cases.case import Case
from expunge.cases.data import TensorData
from expunge.errors import BadData, BadRequest, BadSetting
from expunge.files import digest_weights
from expunge.seeds import generator
from expunge.tasks import task as make_task
from expunge.tasks.gan import Gan

Judge = Callable[[Tensor], Tensor]
"""images (N, ...) -> (N, K) probabilities of K classes, (N,) probabilities of one feature (class 1), or (N,) class numbers."""


def judged(judge: Judge, images: Tensor, batch_size: int = 512) -> Tensor:
    """(N, K) float64 probabilities, whatever form the judge answers in."""
    with torch.no_grad():
        answers = [torch.as_tensor(judge(part)) for part in images.split(batch_size)]
    if any(not a.is_floating_point() for a in answers):
        answers = [a.long() for a in answers]
        classes = max(int(max(a.max() for a in answers)) + 1, 2)
        return torch.cat([torch.nn.functional.one_hot(a, classes) for a in answers]).double()
    found = torch.cat(answers).double()
    if found.dim() == 1:
        found = torch.stack([1 - found, found], 1)
    if found.dim() != 2 or bool((found < -1e-6).any()) or bool((found.sum(1) - 1).abs().max() > 1e-3):
        raise BadSetting(
            f"expected a judge that answers with probabilities (N, K) or (N,), or class numbers, found values from "
            f"{float(found.min()):.3g} to {float(found.max()):.3g} of shape {tuple(found.shape)}; apply softmax or sigmoid in it"
        )
    return found


def judge_digest(judge: Any) -> str:
    """What tells two judges apart: their own digest, their weights, or their name."""
    own = getattr(judge, "digest", None)
    if isinstance(own, str):
        return own
    if isinstance(judge, nn.Module):
        return digest_weights(judge.state_dict())
    name = f"{getattr(judge, '__module__', '')}.{getattr(judge, '__qualname__', type(judge).__qualname__)}"
    return hashlib.sha256(name.encode()).hexdigest()


def verify_independent(scoring: Judge | None, told: Mapping[str, Any]) -> None:
    """Raise where the judge that scores is the one that split the samples which a method learns from. told: of `own_samples`."""
    if scoring is not None and told.get("judge") == judge_digest(scoring):
        raise BadSetting(
            "expected a scoring judge that is not the one which filtered the samples, found the very same "
            f"({judge_digest(scoring)[:12]}); train a second one"
        )


def split_by(probabilities: Tensor, forget: int, threshold: float) -> Tensor:
    """(N,) labels: `forget` where its probability reaches the threshold, else the most probable other class. Every sample gets
    one, so negatives and positives are disjoint and together are all."""
    if not 0 <= forget < probabilities.shape[1]:
        raise BadRequest(
            f"expected a class that the judge knows, 0..{probabilities.shape[1] - 1}, found {forget}; correct the request"
        )
    others = probabilities.clone()
    others[:, forget] = -1
    return torch.where(probabilities[:, forget] >= threshold, forget, others.argmax(1))


def own_samples(
    model: nn.Module, judge: Judge, forget: int, *, samples: int = 5000, threshold: float = 0.5, seed: int = 0,
    task: Gan | None = None,
) -> tuple[TensorData, dict[str, Any]]:  # fmt: skip
    """A table of the model's samples with their latents and judged labels, and how it was made (counts, threshold, digest)."""
    task = task or Gan()
    latents = task.draw(model, samples, generator(seed, "feedback")).cpu()
    images = task.sample(model, samples, seed, latents=latents)
    finite = torch.isfinite(images.flatten(1)).all(1)
    latents, images = latents[finite], images[finite]
    if not len(images):
        raise BadData(f"expected finite samples, found NaN or infinity in all {samples}; the generator has diverged")
    labels = split_by(judged(judge, images), forget, threshold)
    negatives = int((labels == forget).sum())
    if negatives in (0, len(labels)):
        raise BadRequest(
            f"expected samples with and without class {forget}, found {negatives} with it among {len(labels)}; draw more samples, "
            "or move the threshold"
        )
    told = {
        "samples": samples, "negatives": negatives, "positives": len(labels) - negatives, "dropped": int((~finite).sum()),
        "threshold": threshold, "seed": seed, "judge": judge_digest(judge),
    }  # fmt: skip
    return TensorData(inputs=images, latents=latents, labels=labels), told


def feedback(
    model: nn.Module, judge: Judge, forget: int, *, samples: int = 5000, threshold: float = 0.5, seed: int = 0,
    task: Any = "gan", **case: Any,
) -> Case:  # fmt: skip
    """A case on the model's own samples, judged: `forget` holds the negatives, `retain` the positives. No training data is read.

    threshold: probability of class `forget` from which a sample counts as showing it. case: further fields of `Case` (name,
    recipe, ...); real test data is not of this table and goes to the audit instead.
    """
    made = make_task(task) if not isinstance(task, Gan) else task
    assert isinstance(made, Gan)
    verify_independent(getattr(case.get("exam"), "judge", None), {"judge": judge_digest(judge)})
    table, told = own_samples(model, judge, forget, samples=samples, threshold=threshold, seed=seed, task=made)
    return Case(model, table, requests.label(forget), task=made, notes={"feedback": told}, **case)
