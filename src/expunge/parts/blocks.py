"""The stack of blocks of a transformer, and what a block is made of, found by structure and by the usual names."""

from __future__ import annotations

from torch import nn

from expunge.errors import BadModel, BadSetting

PARTS = {
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "ff"),
    "attention": ("self_attn", "attn", "attention", "self_attention"),
}
"""Kind of a block's part -> names of the submodule in the models there are."""


def block_stack(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and list of the model's blocks: the outermost list of modules of one class that holds the most weights, experts
    apart; None where there is none."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        alike = isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
        if alike and not name.endswith("experts"):
            size = sum(p.numel() for p in module.parameters())
            if best is None or size > best[0]:
                best = size, name, module  # type: ignore[assignment]
    return None if best is None else (best[1], best[2])


def block_names(model: nn.Module) -> list[str]:
    """Names of the blocks, first to last; `BadModel` for a model that is no stack of blocks."""
    stack = block_stack(model)
    if stack is None:
        raise BadModel(
            f"expected a stack of blocks (a transformer), found none in {type(model).__name__}; "
            "choose a scope by parameter names instead: layers('...')"
        )
    return [f"{stack[0]}.{i}" if stack[0] else str(i) for i in range(len(stack[1]))]


def block_parts(model: nn.Module, kind: str) -> list[str]:
    """The name of each block's part of this kind: "mlp", "attention", or "block" for the whole."""
    names = block_names(model)
    if kind == "block":
        return names
    if kind not in PARTS:
        raise BadSetting(f"expected a part of a block, one of {', '.join([*PARTS, 'block'])}, found {kind!r}; use one")
    found = []
    for name in names:
        block = model.get_submodule(name)
        own = next((c for c in PARTS[kind] if isinstance(getattr(block, c, None), nn.Module)), None)
        if own is None:
            children = ", ".join(n for n, _ in block.named_children())
            raise BadModel(
                f"expected a block with a part named {' or '.join(PARTS[kind])}, found {children} in {name}; "
                "choose the weights by name instead: layers('...')"
            )
        found.append(f"{name}.{own}")
    return found
