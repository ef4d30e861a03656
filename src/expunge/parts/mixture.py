"""Mixture-of-experts layers found by their structure: a router with one row per expert, and the experts beside it.

Experts are a list of modules (each an expert), or, in recent versions of transformers, one module with fused weights of
shape (experts, ...). Routers are linear with a softmax over all experts (Mixtral, Qwen-MoE, OLMoE, DeepSeek-V2, gpt-oss);
routing probabilities are computed here from the layer's input and the router's weight, so that they are those of all
experts and carry a gradient, whatever the router's own forward returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import BadSetting, UnmetNeed, nearest
from expunge.parts.step import capturing
from expunge.tasks.base import Batch, Task, evaluating, move_to_model

ROUTERS = ("gate", "router")


@dataclass(frozen=True)
class Mixture:
    """One layer: the names of the module, of its router and of its experts; how many there are, how many a token takes."""

    name: str
    router: str
    experts: str
    count: int
    top_k: int

    def probabilities(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """(..., d) the layer's input -> (..., count) softmax over all experts, in float32 at least."""
        router: Any = model.get_submodule(self.router)
        kind = torch.promote_types(hidden.dtype, torch.float32)
        bias = getattr(router, "bias", None)
        logits = F.linear(hidden.to(kind), router.weight.to(kind), None if bias is None else bias.to(kind))
        return logits.softmax(-1)

    def gates(self, model: nn.Module, hidden: Tensor, renormalised: bool = False) -> Tensor:
        """The probabilities of the `top_k` experts each token goes to, zero for the others; renormalised to sum to one
        where the model does so."""
        p = self.probabilities(model, hidden)
        best = p.topk(self.top_k, dim=-1)
        kept = torch.zeros_like(p).scatter(-1, best.indices, best.values)
        return kept / kept.sum(-1, keepdim=True) if renormalised else kept

    def parameters_of(self, model: nn.Module, numbers: Iterable[int]) -> dict[str, Tensor | bool]:
        """Mask entries of these experts' weights: whole parameters, or rows of fused ones."""
        owner = model.get_submodule(self.experts)
        if isinstance(owner, nn.ModuleList):
            return {f"{self.experts}.{i}.{n}": True for i in numbers for n, _ in owner[i].named_parameters()}
        found: dict[str, Tensor | bool] = {}
        for name, p in owner.named_parameters():
            rows = torch.zeros(p.shape, dtype=torch.bool, device=p.device)
            rows[list(numbers)] = True
            found[f"{self.experts}.{name}"] = rows
        return found


def mixtures(model: nn.Module) -> list[Mixture]:
    """The mixture layers of a model, first to last; [] for a dense one."""
    found = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        key = next((r for r in ROUTERS if isinstance(getattr(module, r, None), nn.Module)), None)
        if not isinstance(experts, nn.Module) or key is None:
            continue
        router = getattr(module, key)
        weight = getattr(router, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        count = int(weight.shape[0])
        listed = isinstance(experts, nn.ModuleList) and len(experts) == count
        own = list(experts.parameters())
        if listed or (own and not isinstance(experts, nn.ModuleList) and all(p.shape[0] == count for p in own)):
            prefix = f"{name}." if name else ""
            found.append(Mixture(name, f"{prefix}{key}", f"{prefix}experts", count, _top_k(model, module, router)))
    return found


def need_mixtures(model: nn.Module) -> list[Mixture]:
    """The same; a dense model is refused by name."""
    found = mixtures(model)
    if not found:
        raise UnmetNeed(
            f"expected a mixture-of-experts model (layers with a router and experts), found {type(model).__name__}, which is "
            "dense; choose a method for dense models, such as npo or sha256"
        )
    return found


def mixture_named(model: nn.Module, name: str) -> Mixture:
    known = {m.name: m for m in need_mixtures(model)}
    if name not in known:
        raise BadSetting(
            f"expected a mixture layer, one of {', '.join(known)}, found '{name}'.{nearest(name, known)} Use one of them"
        )
    return known[name]


@torch.no_grad()
def affinities(task: Task, model: nn.Module, batches: Iterable[Batch], renormalised: bool = False) -> dict[str, Tensor]:
    """Layer name -> (experts,) mean over examples of the mean over their own tokens of each expert's gate.

    a_i = (1/N) sum_j (1/L_j) sum_t g_{i,t}, g zero outside the top k (SEUF, 2411.18797): at most 1 in sum, and 1 if
    renormalised."""
    layers = need_mixtures(model)
    total = {layer.name: torch.zeros(layer.count) for layer in layers}
    count = 0
    with evaluating(model):
        for batch in batches:
            batch = move_to_model(batch, model)
            with capturing(model, [f"{layer.name}.input" for layer in layers]) as seen:
                task.forward(model, batch)
            for layer in layers:
                gates = layer.gates(model, seen[f"{layer.name}.input"], renormalised)
                total[layer.name] += mean_over_tokens(gates, batch).sum(0).cpu()
            count += len(batch)
    return {name: value / max(count, 1) for name, value in total.items()}


def mean_over_tokens(values: Tensor, batch: Batch) -> Tensor:
    """(B, T, ...) -> (B, ...), the mean over each row's real tokens; (B, E) stays as it is: one token per example."""
    if values.dim() < 3:
        return values
    mask = batch.columns.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != values.shape[:2]:
        return values.mean(1)
    weight = mask.to(values.dtype)
    while weight.dim() < values.dim():
        weight = weight[..., None]
    return (values * weight).sum(1) / weight.sum(1).clamp_min(1)


def most_used(affinity: dict[str, Tensor], top: int = 1) -> tuple[tuple[str, int], ...]:
    """The `top` (layer, expert) pairs with the highest affinity, highest first; ties go to the earlier layer and expert."""
    pairs = [(name, i, float(value)) for name, values in affinity.items() for i, value in enumerate(values)]
    return tuple((name, i) for name, i, _ in sorted(pairs, key=lambda pair: -pair[2])[:top])


def _top_k(model: nn.Module, *owners: Any) -> int:
    for owner in (*owners, getattr(model, "config", None)):
        for name in ("top_k", "num_experts_per_tok", "k"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return 1
