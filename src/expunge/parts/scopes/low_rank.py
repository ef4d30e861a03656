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

    def names(self, model: nn.Module) -> list[str]:
        """The layers that get adapters."""
        names = list(self.targets) or adaptable(model)
        if not names:
            raise BadSetting(
                "expected linear or convolution layers to put adapters on, found none that may move; "
                "name them (targets=(...)), or thaw the model's weights"
            )
        return names

    def enter(self, model: nn.Module, workbench: Any) -> nn.Module:
        peft = need_extra("peft", "adapters")
        # a pattern that matches whole names: peft would otherwise take "1" as a suffix of "11"
        pattern = "^(" + "|".join(n.replace(".", r"\.") for n in self.names(model)) + ")$"
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=pattern)
        adapted = peft.LoraModel(model, config, "default")
        # in the first phase, and where no subclass moves the base: without its adapters, this is the original
        if type(self) is LowRank and workbench.phase == 0:
            workbench.references.lend("original", adapted)
        return adapted

    def select(self, workbench: Any) -> Mask:
        return {n: "lora_" in n for n, _ in workbench.model.named_parameters()}

    def leave(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()  # type: ignore[operator]

    def __str__(self) -> str:
        return f"low_rank({self.rank})"


def adaptable(model: nn.Module, kinds: tuple[str, ...] = ("Linear", "Conv1D", "Conv2d")) -> list[str]:
    """Names of the layers of these classes that an adapter may be merged into.

    Left out are frozen ones (a scope never thaws), a language model's output layer (as peft's "all-linear" does), and those
    that share their weight with another module, which a merge would change as well.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = []
    for name, module in model.named_modules():
        fits = name and module is not head and any(k.__name__ in kinds for k in type(module).__mro__)
        weight = getattr(module, "weight", None)
        if fits and isinstance(weight, nn.Parameter) and weight.requires_grad and owners[id(weight)] == 1:
            found.append(name)
    return found


def low_rank(rank: int = 8, alpha: float = 16.0, targets: tuple[str, ...] = ()) -> Scope:
    """Adapters of this rank on the named layers (default: all linear and convolution layers), merged at the end."""
    return LowRank(rank, alpha, tuple(targets))
