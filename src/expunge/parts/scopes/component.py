"""Parts of a pipeline: the denoising network's cross-attention, all but it, the text encoder. Names as diffusers gives them."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

from expunge.errors import BadSetting
from expunge.parts.scopes.base import Mask, Scope

PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # name: (patterns that may move, patterns that may not)
    "cross_attention": (("*attn2.*",), ("text_encoder.*", "vae.*")),
    "cross_attention_kv": (("*attn2.to_k.*", "*attn2.to_v.*"), ("text_encoder.*", "vae.*")),
    "not_cross_attention": (("unet.*", "transformer.*"), ("*attn2.*",)),
    "attention": (("*attn1.*", "*attn2.*", "*attentions.*"), ("text_encoder.*", "vae.*")),
    "network": (("unet.*", "transformer.*"), ()),
    "text_encoder": (("text_encoder.*",), ("*embeddings.*",)),
    "class_embedding": (("*class_embedding.*",), ()),
}
"""What the erasers move: ESD-x, ESD-x-strict (also UCE and CA), ESD-u, attention, everything, AdvUnlearn's encoder (without its
word and position embeddings, in which prompt attacks move), the class table."""


@dataclass(frozen=True)
class Component(Scope):
    part: str

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise BadSetting(
                f"expected a part of a pipeline, one of {', '.join(PARTS)}, found {self.part!r}; use layers('pattern') for others"
            )

    def thaws(self, name: str) -> bool:
        """A `Denoiser` rests its text encoder by default; this scope is asked for by name, so it may move it."""
        return self.part == "text_encoder" and name.startswith("text_encoder.")

    def select(self, workbench: Any) -> Mask:
        wanted, refused = PARTS[self.part]

        def moves(name: str) -> bool:
            inside = any(fnmatch.fnmatch(name, p) for p in wanted)
            return inside and not any(fnmatch.fnmatch(name, p) for p in refused)

        names = [name for name, _ in workbench.model.named_parameters()]
        mask: Mask = {name: moves(name) for name in names}
        if not any(mask.values()):
            raise BadSetting(
                f"expected a model with a part '{self.part}', found none among its weights ({', '.join(names[:3])}, ...); "
                "class-conditional networks have no cross-attention: use component('network') or 'attention'"
            )
        return mask

    def __str__(self) -> str:
        return self.part


def component(part: str) -> Scope:
    """One of `PARTS`: cross_attention, cross_attention_kv, not_cross_attention, attention, network, text_encoder, ..."""
    return Component(part)
