"""Logit lens and head projection: is the answer still written inside, though the output no longer says it?

    logit lens          q_l = softmax(W_U LN_f(h_l)) at the places that predict the answer; its probability, layer by layer
    head projection     C = union over layers of the k likeliest tokens of q_l; success if the answer's token is in C, |C| <= k L
    probability delta   C = union over layers of the k tokens that rise most and the k that fall most from q_l to q_{l+1}

(Patil et al., "Can Sensitive Information Be Deleted From LLMs?", arXiv 2309.17410, and the language attacks card, 4.) The
paper's answers are single tokens. An answer of many tokens counts by the share of them that are found, each at its own
place with the true tokens before it, and only tokens that the original knew (p >= 0.02) count. The released code ignores
its k and always takes 5; here k is k. A retrained model's layers also guess words that anyone would, so it is the zero line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audits.attacks.activations import decoder, find_decoder, lens_output, streams
from expunge.audits.attacks.budget import Attack, Budget, attack_check
from expunge.audits.base import Measurement, check
from expunge.errors import BadSetting, UnmetNeed
from expunge.tasks.language import nll

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case
    from expunge.cases.data import Split

KNOWN = 0.02
"""Probability of a token, above which the original is said to have known it."""


def lens_scores(model: nn.Module, case: Case, split: Split, seed: int = 0, place: str = "block") -> np.ndarray:
    """(layers, n) forget scores that each layer's lens gives; place "block" starts with what enters the first block."""
    parts, found = decoder(model), []
    for batch, layers in streams(model, case.task, split, seed, place=place):
        scores = [case.task.forget_score(lens_output(parts, h, batch), batch) for h in layers]
        found.append(torch.stack(scores).double().cpu().numpy())
    return np.concatenate(found, axis=1)


def candidates(logits: Tensor, k: int, delta: bool = False) -> Tensor:
    """(N, C) token ids from the lens logits (layers, N, V): the k likeliest of each layer, or the k largest rises and the k
    largest falls between neighbouring layers. Ids repeat where layers agree, so at most C of them differ."""
    if k < 1 or k > logits.shape[-1]:
        raise BadSetting(f"expected k in 1..{logits.shape[-1]} candidates of a layer, found {k}; correct it")
    if not delta:
        best = logits.topk(k, dim=-1).indices
    else:
        change = logits.softmax(-1).diff(dim=0)
        best = torch.cat([change.topk(k, dim=-1).indices, (-change).topk(k, dim=-1).indices], dim=-1)
    return best.transpose(0, 1).flatten(1)


class ReadsInside(Attack):
    """Base of attacks that read a language model's streams and change nothing."""

    def run(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> nn.Module:
        raise UnmetNeed(
            f"expected an attack that changes the model, found {self.name}, which reads it; call scores(...)"
        )

    def skipped(self, subjects: Subjects) -> str | None:
        if subjects.task.name != "language":
            return f"expected a language model, found {subjects.task.name}"
        lacking = [name for name in subjects.compared if find_decoder(subjects.model(name)) is None]
        if lacking:
            return f"expected blocks and an output head to read, found none in {', '.join(lacking)}"
        return None

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        return {"steps": 0, "examples": 0, "queries": len(case.split("forget"))}


@dataclass(frozen=True)
class LogitLens(ReadsInside):
    """The layer whose lens knows the forget set best. The last one is the output itself."""

    place: str = "block"

    @property
    def name(self) -> str:
        return "logit_lens" if self.place == "block" else f"logit_lens_{self.place}"

    def scores(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> np.ndarray:
        layers = lens_scores(model, case, self.scored(case, budget, seed), seed, self.place)
        return layers[layers.mean(1).argmax()]


@dataclass(frozen=True)
class HeadProjection(ReadsInside):
    """Share of an answer's known tokens among the candidates of the layers. layers: block numbers from 0, None for all."""

    k: int = 4
    layers: tuple[int, ...] | None = None
    delta: bool = False

    @property
    def name(self) -> str:
        return "probability_delta" if self.delta else "head_projection"

    def positions(self, case: Case, budget: Budget, seed: int) -> Tensor | None:
        known = [float(row.max()) >= KNOWN for row in self._known(case, seed)]
        places = torch.tensor(known).nonzero().flatten()
        return None if len(places) in (0, len(known)) else places

    def scores(self, model: nn.Module, case: Case, budget: Budget, seed: int) -> np.ndarray:
        parts, scores, split = decoder(model), [], self.scored(case, budget, seed)
        places = self.positions(case, budget, seed)
        known = self._known(case, seed)
        chance = iter(known if places is None else [known[i] for i in places.tolist()])
        for batch, stream in streams(model, case.task, split, seed):
            blocks = stream[1:] if self.layers is None else [stream[1 + i] for i in self.layers]
            blocks = stream if self.delta and self.layers is None else blocks
            answers = case.task.answers_at(batch)  # type: ignore[attr-defined]
            logits = torch.stack([lens_output(parts, h, batch).prediction for h in blocks])
            for row, truth in enumerate(answers):
                counts = torch.from_numpy(next(chance) >= KNOWN).to(truth.device)
                own = truth[: len(counts)]
                hit = (candidates(logits[:, row, : len(own)], self.k, self.delta) == own[:, None]).any(1)
                scores.append(float(hit[counts].double().mean()) if bool(counts.any()) else 0.0)
        return np.array(scores)

    def _known(self, case: Case, seed: int) -> list[np.ndarray]:
        """The original's probability of every answer token, one array for each forgotten row."""
        found = []
        parts = decoder(case.model)
        for batch, stream in streams(case.model, case.task, case.split("forget"), seed):
            table = case.task.per_choice(nll, lens_output(parts, stream[-1], batch), batch, reduce="none")
            for row, count in zip(table, case.task.choices(batch).int().tolist(), strict=True):
                found.append((-row[:count]).exp().double().cpu().numpy())
        return found

    def cost(self, case: Case, budget: Budget) -> dict[str, int]:
        parts = find_decoder(case.model)
        blocks = len(self.layers or ()) or (len(parts.blocks) if parts is not None else 0)
        return super().cost(case, budget) | {"candidates": self.k * blocks * (2 if self.delta else 1)}


@check(
    "logit_lens", unit="forget score", needs=("retrained", "forget"), kinds=("language",), attack=True,
    source="language attacks card, 4 (logit lens)",
)  # fmt: skip
def logit_lens(subjects: Subjects, budget: Budget = Budget(), place: str = "block") -> list[Measurement]:  # noqa: B008
    """What the layer that knows the forget set best says of it through the output head; curves by layer."""
    if LogitLens(place).skipped(subjects) is not None:
        return []
    case = subjects.case
    layers = {
        s: lens_scores(subjects.model(s), case, case.split("forget"), subjects.seed, place) for s in subjects.compared
    }
    best = {s: values[values.mean(1).argmax()] for s, values in layers.items()}
    measured = subjects.measure(lambda subject: best[subject])
    curves = {s: {"layer": list(range(len(v))), "forget_score": v.mean(1).tolist()} for s, v in layers.items()}
    return [
        logit_lens.measurement(
            measured, name="forget_score", split="forget", curves=curves,
            per_example={s: v.tolist() for s, v in best.items()},
            note=f"best layer of {', '.join(f'{s} {int(v.mean(1).argmax())}' for s, v in layers.items())}",
        )
    ]  # fmt: skip


SOURCE = "arXiv 2309.17410; language attacks card, 4"
head_projection = attack_check(
    HeadProjection(),
    "Share of the answers' tokens among the k likeliest of some layer's lens.",
    kinds=("language",),
    source=SOURCE,
)
probability_delta = attack_check(
    HeadProjection(delta=True),
    "Share of the answers' tokens among those whose probability changes most between layers.",
    kinds=("language",),
    source=SOURCE,
)
