"""UCE: the keys and values of cross-attention are solved for, so that the concept's text gives what the guide's text gives.

Paper: "Unified Concept Editing in Diffusion Models", Gandikota et al., WACV 2024, https://arxiv.org/abs/2308.14761, eq. 7.

    W' = (lam W + s_e sum_e v_e c_e' + s_p sum_p (W c_p) c_p') (lam I + s_e sum_e c_e c_e' + s_p sum_p c_p c_p')^-1,   v_e = W c_guide

for every attn2.to_k and attn2.to_v, in float64; c is the text encoder's last hidden state at the last content token. It is the
minimum of  sum_e s_e ||W' c_e - v_e||^2 + sum_p s_p ||W' c_p - W c_p||^2 + lam ||W' - W||^2. `positions="tail"`: every position
from that token to the end, aligned between concept and guide (the older code, and UnlearnCanvas's). `erase="project"`: v_e is
W c_guide without its part along W c_e / ||W c_e|| (the code's `tensor` variant).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from expunge.cases.case import Case
from expunge.engine.workbench import Workbench
from expunge.errors import UnmetNeed
from expunge.methods.registry import method, setting
from expunge.parts.plan import Edit
from expunge.tasks.base import evaluating

TEMPLATES = ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")
"""The official code's expansion of a concept (its word alone, and five prompts)."""
Pairs = tuple[Tensor, Tensor]


def text_states(model: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The text encoder's last hidden states (N, L, d) in float64 and the last content token's position (N,); for the empty
    prompt the start token's."""
    ids = model.conditions.of(list(prompts))
    with evaluating(model):
        states = torch.cat([model.encode(part).double().cpu() for part in ids.split(64)])
    return states, torch.tensor([len(model.conditions.content(row)) for row in ids])


def directions(model: Any, prompts: Sequence[str], guides: Sequence[str], positions: str) -> Pairs:
    """Concept and guide vectors, each (n, d): one pair per prompt and its guide, or one per aligned position of their tails."""
    states, last = text_states(model, prompts)
    guided, at = text_states(model, guides)
    rows = torch.arange(len(states))
    if positions == "last":
        return states[rows, last], guided[rows, at]
    sources, targets = [], []
    for row, first, other, start in zip(states, last.tolist(), guided, at.tolist(), strict=True):
        length = len(row) - max(first, start)
        sources.append(row[first : first + length])
        targets.append(other[start : start + length])
    return torch.cat(sources), torch.cat(targets)


def solved(
    weight: Tensor, edits: Pairs, kept: Tensor, lam: float, erase_scale: float, keep_scale: float, erase: str
) -> Tensor:
    """W' (out, d) from W (out, d), concept and guide vectors (n, d) each, preserved vectors (m, d); float64."""
    W = weight.double()
    source, guide = edits
    values = guide @ W.T
    if erase == "project":
        along = torch.nn.functional.normalize(source @ W.T, dim=1)
        values = values - (values * along).sum(1, keepdim=True) * along
    eye = torch.eye(W.shape[1], dtype=W.dtype)
    left = lam * W + erase_scale * values.T @ source + keep_scale * (kept @ W.T).T @ kept
    right = lam * eye + erase_scale * source.T @ source + keep_scale * kept.T @ kept
    return torch.linalg.solve(right, left, left=False)


@method(
    family="edited", kinds=("diffusion",), intention="removal", mechanism="closed-form edit",
    paper="Gandikota et al., WACV 2024, 2308.14761",
)  # fmt: skip
def uce(
    case: Case,
    concept: Annotated[tuple[str, ...], setting("what to erase, in words; several are erased at once")],
    guide: Annotated[
        str, setting("what they become, in the same templates and prompts; empty: nothing in particular")
    ] = "",
    preserve: Annotated[
        tuple[str, ...] | None, setting("prompts to keep; none: up to `most` of the retain rows' own prompts")
    ] = None,
    expand: Annotated[bool, setting("erase each concept in the paper's five templates as well")] = False,
    own_prompts: Annotated[bool, setting("erase the forget rows' own prompts as well")] = False,
    lam: Annotated[float, setting("how much the weights as they are count", gt=0)] = 0.5,
    erase_scale: Annotated[float, setting("weight of each erased direction", gt=0)] = 1.0,
    preserve_scale: Annotated[float, setting("weight of each kept direction", ge=0)] = 1.0,
    positions: Annotated[Literal["last", "tail"], setting("which positions of a prompt are edited")] = "last",
    erase: Annotated[Literal["replace", "project"], setting("become the guide, or the guide without the concept")] = (
        "replace"
    ),
    most: Annotated[int, setting("most preserved prompts taken from the data", ge=0)] = 200,
) -> Edit:
    """Solve for the keys and values that map the concept's text to the guide's."""
    if case.model.kind != "text" or not attention_weights(case.model):
        raise UnmetNeed(
            f"expected a text-conditional model with cross-attention for uce, found a {case.model.kind}-conditional one; use "
            "esd or salun_generation"
        )

    @torch.no_grad()
    def apply(bench: Workbench) -> None:
        model: Any = bench.model
        templates = TEMPLATES if expand else TEMPLATES[:1]
        prompts = [t.format(c) for c in concept for t in templates]
        guides = [t.format(guide) if guide else "" for _ in concept for t in templates]
        if own_prompts:
            ids = own_conditions(bench, "forget")
            for word in concept:
                ids, asked = model.conditions.replaced(ids, f"{word} -> {guide}"), ids
                changed = (ids != asked).any(1)
                prompts += texts(model, asked[changed])
                guides += texts(model, ids[changed])
        kept_prompts = list(preserve) if preserve is not None else texts(model, own_conditions(bench, "retain"))[:most]
        for word in concept:
            model.conditions.words(word)  # a concept that the tokenizer cannot write is refused
        edits = directions(model, prompts, guides, positions)
        width = edits[0].shape[1]
        kept = (
            directions(model, kept_prompts, kept_prompts, "last")[0] if kept_prompts else torch.zeros(0, width).double()
        )
        for weight in attention_weights(model).values():
            new = solved(weight.cpu(), edits, kept, lam, erase_scale, preserve_scale, erase)
            weight.copy_(new.to(weight))
        bench.note("edited_directions", len(edits[0]))
        bench.note("preserved_prompts", len(kept_prompts))

    return Edit(apply, f"W ← argmin Σ‖W c - W0 guide‖² + Σ‖W p - W0 p‖² + {lam:g}‖W - W0‖² over attn2 k, v")


def attention_weights(model: Any) -> dict[str, Tensor]:
    """Key and value weights of every cross-attention, by name."""
    return {
        name: p for name, p in model.named_parameters() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }


def own_conditions(bench: Workbench, split: str) -> Tensor:
    """(n, L) the distinct prompts of a split's rows, as token ids."""
    rows: Any = bench.splits[split]
    return bench.task.condition(rows.data.fetch(rows.ids)).unique(dim=0)  # type: ignore[attr-defined]


def texts(model: Any, ids: Tensor) -> list[str]:
    """Prompts as texts, without start, end and padding."""
    return [model.conditions.text(model.conditions.content(row)) for row in ids]
