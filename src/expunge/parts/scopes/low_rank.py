"""Low-rank adapters as a scope: only A and B of W + (alpha/r) B A move, and the merged model comes back as it came.

Hu et al., 2106.09685, by the library peft. B starts at zero, so that the first forward is the original's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from expunge.errors import BadSetting, need_extra
from expunge.parts.scopes.base import Mask, Scope


@dataclass(frozen=True)
class LowRank(Scope):
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadSetting(f"expected rank >= 1, found {self.rank}; correct it")

    def enter(self, model: nn.Module, workbench: Any) -> nn.Module:
        peft = need_extra("peft", "adapters")
        names = list(self.targets) or [
            n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n
        ]
        if not names:
            raise BadSetting(
                "expected linear or convolution layers to put adapters on, found none; name them: low_rank(targets=(...))"
            )
        # a pattern that matches whole names: peft would otherwise take "1" as a suffix of "11"
        pattern = "^(" + "|".join(n.replace(".", r"\.") for n in names) + ")$"
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=pattern)
        return peft.LoraModel(model, config, "default")

    def select(self, workbench: Any) -> Mask:
        return {n: "lora_" in n for n, _ in workbench.model.named_parameters()}

    def leave(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()  # type: ignore[operator]

    def __str__(self) -> str:
        return f"low_rank({self.rank})"


def low_rank(rank: int = 8, alpha: float = 16.0, targets: tuple[str, ...] = ()) -> Scope:
    """Adapters of this rank on the named layers (default: all linear and convolution layers), merged at the end."""
    return LowRank(rank, alpha, tuple(targets))
