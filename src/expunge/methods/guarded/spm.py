"""SPM: a thin adapter learns to erase one concept, and is let through as far as a prompt is about it. The weights stay.

Paper: "One-dimensional Adapter to Rule Them All: Concepts, Diffusion Models and Erasing Applications", Lyu et al., CVPR 2024,
https://arxiv.org/abs/2312.16145.

    adapter   y = W x + m (alpha / r) U D x,  r = 1, U = 0 at first, on every Linear and Conv of the transformer blocks
    min       || o(z_t, c) - [o0(z_t, "") - g (o0(z_t, c) - o0(z_t, ""))] ||^2  +  1000 || o(z_t, a) - o0(z_t, a) ||^2     m = 1
              z_t by the student's partial sampling; a: 4 random embeddings of c's norm, fewer near c
    serve     m = max(cos(prompt, c), share of c's tokens that are in the prompt); adapters of several concepts add up

Each concept's adapter is trained alone, and needs no images. Departures: cosine without restarts (paper: three), AdamW in 32 bits; m is
each row's own, and scales the product U D once.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import torch
from torch import nn

from expunge.cases.case import Case
from expunge.cases.data import Split, TensorData
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Lr, Steps
from expunge.parts.attention_maps import cross_attention
from expunge.parts.concept_adapters import ConceptAdapters
from expunge.parts.guarded_diffusion import written
from expunge.parts.objectives import negated
from expunge.parts.objectives.random_conditions import Shared, keep_around
from expunge.parts.plan import Auxiliary, Guard, Optimizer, Plan, Term
from expunge.parts.references import frozen_view
from expunge.tasks.sampling import Sampling

if TYPE_CHECKING:
    from expunge.engine.workbench import Workbench


def untrained(case: Case, seed: int, concept: str, rank: int, alpha: float) -> nn.Module:
    """One concept's adapter on a view of the model, let through in full; only the adapter may move."""
    return ConceptAdapters(frozen_view(case.model), [concept], rank, alpha, seed, gate=False)


def prompts_of(case: Case, concept: str, rows: int) -> Split:
    """A split of the concept's own words as prompts (several take turns); no images."""
    ways = torch.cat([written(case.model, words.strip()) for words in concept.split("|")])
    table = TensorData(latents=torch.zeros(rows, *case.model.shape), input_ids=ways[torch.arange(rows) % len(ways)])  # type: ignore[arg-type, misc]
    return Split(f"prompts of {concept}", table, torch.arange(rows))


@method(
    family="guarded", kinds=("diffusion",), intention="suppression", mechanism="gated adapter",
    paper="Lyu et al., CVPR 2024, 2312.16145",
)  # fmt: skip
def spm(
    case: Case,
    concept: Annotated[
        tuple[str, ...], setting("what to erase, in words; an adapter for each; 'red | crimson' is one")
    ],
    eta: Annotated[float, setting("strength of the negative guidance", gt=0)] = 1.0,
    anchoring: Annotated[float, setting("weight of staying as it was at random embeddings", ge=0)] = 1000.0,
    anchors: Annotated[int, setting("random embeddings for each row", ge=1)] = 4,
    rank: Annotated[int, setting("of the adapters", ge=1)] = 1,
    alpha: Annotated[float, setting("scale of the adapters, over their rank", gt=0)] = 1.0,
    strength: Annotated[float, setting("of the adapters when serving; 0: the original bit for bit", ge=0)] = 1.0,
    steps: Steps = 3000,
    lr: Lr = 1e-4,
    batch_size: BatchSize = 1,
    warmup: Annotated[float, setting("share of the steps in which the step size rises", ge=0, le=1)] = 1 / 6,
    sampling_steps: Annotated[int, setting("of the partial sampling", ge=1)] = 30,
    guidance: Annotated[float, setting("of the partial sampling, diffusers' convention", ge=1)] = 3.0,
) -> Guard:
    """Train an adapter to erase each concept, and let it through by the prompt."""
    cross_attention(case.model, "spm")
    latents = Shared("student", Sampling(sampling_steps, guidance))
    splits = {words: prompts_of(case, words, batch_size) for words in concept}  # what cannot be written is refused here

    def plan(words: str) -> Plan:
        on = splits[words].name
        return Plan(
            Term(negated(eta, latents=latents), on), Term(keep_around(anchors, latents), on, anchoring),
            trains=Auxiliary(f"adapter of {words}", partial(untrained, concept=words, rank=rank, alpha=alpha)), mode="eval",
            optimizer=Optimizer("adamw", lr=lr, weight_decay=0.01, schedule="cosine", warmup=warmup),
            epochs=steps, batch_size=batch_size, epoch_of=on,
        )  # fmt: skip

    def train(bench: Workbench) -> Plan:
        bench.splits |= {split.name: split for split in splits.values()}
        return Plan(phases=tuple(map(plan, concept)))

    def wrap(bench: Workbench) -> nn.Module:
        guard = ConceptAdapters(bench.model, concept, rank, alpha, strength=strength)
        for number, words in enumerate(concept):
            trained = bench.networks[f"adapter of {words}"].adapters[0]  # type: ignore[index, union-attr]
            guard.adapters[number].load_state_dict(trained.state_dict())  # type: ignore[union-attr]
        return guard

    return Guard(wrap, f"W + m ({alpha:g}/{rank}) U D, m = max(cos, tokens), {plan(concept[0])}", train)
