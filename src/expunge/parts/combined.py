"""Two models, one answer: logits of a second network correct the base's at inference, whose weights stay as they are.

    difference      z_f + w z_g on plausible tokens      ULD (2406.08607): g remembers what must go, and nothing else
    excess          z_f - a relu(z_r - z_f)              Who's Harry Potter (2310.02238): r knows what must go even better

Both run on any model with logits, (B, K) or (B, T, V). On a causal language model of transformers `generate` works as the
base's own does; the second network keeps a cache of its own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import BadModel, BadSetting, need_extra
from expunge.parts.guarded import Guarded, accepts, cache_keyword, companion, differing, with_tensors

OUT_OF_REACH = -1e3
"""The logit of implausible tokens while generating."""


@dataclass(frozen=True)
class Difference:
    """z_f + weight * (z_g - mean_V z_g) where the base finds a token plausible, z_f elsewhere (z_g counts as 0 there).

    Plausible: log p_f >= min(k-th largest log p_f, max log p_f + log threshold), k = max(1, floor(threshold V)); 0 turns the
    filter off. Centring z_g changes nothing without a filter; with one, a uniform g would otherwise shift plausible against
    implausible tokens.
    """

    weight: float = -0.8
    threshold: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise BadSetting(f"expected threshold in 0..1 (share of the largest probability), found {self.threshold}")

    def plausible(self, base: Tensor) -> Tensor:
        """(..., V) bool; never without the likeliest token."""
        if self.threshold == 0:
            return torch.ones_like(base, dtype=torch.bool)
        log_p = base.log_softmax(-1)
        k = max(1, math.floor(self.threshold * base.shape[-1]))
        least = log_p.topk(k, dim=-1).values[..., -1:]
        return log_p >= torch.minimum(least, log_p.amax(-1, keepdim=True) + math.log(self.threshold))

    def __call__(self, base: Tensor, other: Tensor, generating: bool = False) -> Tensor:
        live = self.plausible(base)
        # 0 before the scaling, as published: implausible tokens keep the base's logit
        moved = torch.where(live, other - other.mean(-1, keepdim=True), 0.0)
        value = base + self.weight * moved
        return torch.where(live, value, OUT_OF_REACH) if generating else value

    def __str__(self) -> str:
        return f"z_f{self.weight:+g}·z_g"


@dataclass(frozen=True)
class Excess:
    """z_f - strength * relu(z_r - z_f): what the reinforced model likes better than the base is pushed down."""

    strength: float = 1.0

    def __call__(self, base: Tensor, other: Tensor, generating: bool = False) -> Tensor:
        return base - self.strength * F.relu(other - base)

    def __str__(self) -> str:
        return f"z_f-{self.strength:g}·relu(z_r-z_f)"


Rule = Difference | Excess
RULES: dict[str, type[Rule]] = {"difference": Difference, "excess": Excess}


class CombinedLogits(Guarded):
    """base: f, untouched. other: the second network; its tensors that equal the base's are the base's own.

    blocks: how many of the base's blocks `other` has, where fewer.
    """

    saved_as = "combined_logits"

    def __init__(self, base: nn.Module, other: nn.Module, rule: Rule, blocks: int | None = None):
        super().__init__(base)
        # shared with the base wherever it is the same, so that a second network costs what it adds
        self.other = with_tensors(companion(base, blocks, shared=True), differing(other, base))
        self.rule, self.blocks = rule, blocks
        self.other.eval()

    # -- the base's call -------------------------------------------------------------------------------------------
    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """What the base returns, with combined logits (and their loss, where labels are given)."""
        labels = keywords.pop("labels", None)
        given = {k: v for k, v in keywords.items() if accepts(self.base, k)}
        key = cache_keyword(self.base)
        beside = dict(given)
        if given.get(key) is not None:
            beside[key] = _second_cache(given[key])
        result, second = self.base(*inputs, **given), self.other(*inputs, **beside)
        logits = self.rule(_logits(result), _logits(second))
        result = _with_logits(result, logits)
        if getattr(result, key, None) is not None and getattr(second, key, None) is not None:
            setattr(getattr(result, key), SECOND, getattr(second, key))  # two caches that travel as one
        if labels is not None:
            result["loss"] = _loss(logits, labels)
        return result

    def generate(self, inputs: Tensor | None = None, **keywords: Any) -> Any:
        """As the base's own `generate`, with combined logits at every step. Pass `attention_mask` for padded prompts."""
        generation = need_extra("transformers", "huggingface")
        if not callable(getattr(self.base, "generate", None)):
            raise BadModel(
                f"expected a model that generates, found {type(self.base).__name__}; use a causal language model of transformers"
            )
        ids = inputs if inputs is not None else keywords.pop("input_ids")
        own = SecondLogits(self.other, self.rule, keywords.get("attention_mask"))
        processors = generation.LogitsProcessorList([*(keywords.pop("logits_processor", None) or []), own])
        return self.base.generate(ids, logits_processor=processors, **keywords)  # type: ignore[operator]

    # -- files -----------------------------------------------------------------------------------------------------
    def about(self) -> dict[str, Any]:
        name = next(n for n, kind in RULES.items() if isinstance(self.rule, kind))
        return {"rule": name, "settings": asdict(self.rule), "blocks": self.blocks}

    def tensors(self) -> dict[str, Tensor]:
        return differing(self.other, self.base)

    @classmethod
    def rebuilt(cls, base: nn.Module, about: dict[str, Any], tensors: dict[str, Tensor]) -> CombinedLogits:
        other = with_tensors(companion(base, about["blocks"], shared=True), tensors)
        return cls(base, other, RULES[about["rule"]](**about["settings"]), about["blocks"])


class SecondLogits:
    """A logits processor of transformers: the base's scores (B, V) of the next token, combined with the second network's.

    The network's cache is used while the tokens only grow; whatever else happens to them (beams that change places) is
    noticed, and it reads them anew."""

    def __init__(self, other: nn.Module, rule: Rule, mask: Tensor | None = None):
        self.other, self.rule, self.mask = other, rule, mask
        self.seen: Tensor | None = None
        self.cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        other = self.logits(input_ids)
        # as log-probabilities, which beam search adds up
        return self.rule(scores.float(), other.to(scores.device).float(), generating=True).log_softmax(-1).to(scores)

    def logits(self, ids: Tensor) -> Tensor:
        """(B, V) the second network's logits of the token after `ids` (B, T)."""
        seen = ids[:, :0] if self.seen is None or self.cache is None else self.seen
        grown = len(seen) == len(ids) and seen.shape[1] < ids.shape[1] and torch.equal(ids[:, : seen.shape[1]], seen)
        start = seen.shape[1] if grown else 0
        mask, key = self._mask(ids), cache_keyword(self.other)
        keywords = {
            "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, start:], "use_cache": True,
            key: self.cache if start else None,
        }  # fmt: skip
        result = self.other(input_ids=ids[:, start:], **{k: v for k, v in keywords.items() if accepts(self.other, k)})
        self.seen, self.cache = ids, getattr(result, key, None)
        return _logits(result)[:, -1]

    def _mask(self, ids: Tensor) -> Tensor:
        """The prompts' mask, for several sequences per prompt, and ones on what was generated."""
        if self.mask is None:
            return torch.ones_like(ids)
        prompt = self.mask.to(ids).repeat_interleave(len(ids) // len(self.mask), 0)
        return torch.cat([prompt, ids.new_ones(len(ids), ids.shape[1] - prompt.shape[1])], 1)


SECOND = "expunge_second_cache"


def _second_cache(first: Any) -> Any:
    second = getattr(first, SECOND, None)
    if second is None and getattr(first, "get_seq_length", lambda: 0)() > 0:
        raise BadSetting(
            "expected a cache that this guard has filled, found one of another model; begin without a cache, or call generate()"
        )
    return second


def _logits(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result[0]


def _with_logits(result: Any, logits: Tensor) -> Any:
    if isinstance(result, Tensor):
        return logits
    if hasattr(result, "logits"):
        result["logits"] = logits
        return result
    return (logits, *result[1:])


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy; of the next token where logits are (B, T, V)."""
    if logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits.float(), labels)
