"""Finding layers of a model by running it once on one row, for methods that compare activations.

Names come in the order in which the forward pass calls the layers, which need not be the order of registration. A layer
name means its output; "fc.input" means what goes into fc (see `parts.step.capturing`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from expunge.cases.data import Data
from expunge.errors import BadModel
from expunge.parts.step import capturing
from expunge.tasks.base import Task, evaluating, move_to_model

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Hardswish,
)  # fmt: skip


def called(task: Task, model: nn.Module, data: Data) -> list[tuple[str, nn.Module]]:
    """Modules without children, by name, in the order of their first call on the table's first row."""
    order: list[tuple[str, nn.Module]] = []
    seen: set[str] = set()

    def note(name: str):
        def hook(module: nn.Module, _inputs: Any, _output: Any) -> None:
            if name not in seen:
                seen.add(name)
                order.append((name, module))

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(True for _ in m.children()) and n]
    hooks = [m.register_forward_hook(note(n)) for n, m in leaves]
    try:
        _run(task, model, data)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def last_linear(task: Task, model: nn.Module, data: Data) -> str:
    """The name of the last nn.Linear that a forward pass calls: the output layer of most models."""
    found = [name for name, module in called(task, model, data) if isinstance(module, nn.Linear)]
    if not found:
        raise BadModel(
            "expected the model to call an nn.Linear, found none; name the layer whose output is the representation "
            "(a module's name, or 'name.input' for what goes into it)"
        )
    return found[-1]


def representation(task: Task, model: nn.Module, data: Data) -> str:
    """What goes into the last linear layer, as a layer name."""
    return f"{last_linear(task, model, data)}.input"


def hidden_layers(task: Task, model: nn.Module, data: Data) -> tuple[str, ...]:
    """Activation modules before the output layer; where a model has none (functional activations), the linear,
    convolutional and recurrent layers before it. Empty for a model of one layer."""
    order = called(task, model, data)
    weighted = [i for i, (_, module) in enumerate(order) if isinstance(module, WEIGHTED)]
    before = order[: weighted[-1]] if weighted else order
    activations = tuple(name for name, module in before if isinstance(module, ACTIVATIONS))
    return activations or tuple(name for name, module in before if isinstance(module, WEIGHTED))


def width(task: Task, model: nn.Module, data: Data, layer: str) -> int:
    """Numbers per example of a layer's activation."""
    with capturing(model, [layer]) as seen:
        _run(task, model, data)
    value: Tensor = seen[layer]
    return int(value[0].numel())


def _run(task: Task, model: nn.Module, data: Data) -> None:
    with evaluating(model):
        task.forward(model, move_to_model(data.fetch(torch.zeros(1, dtype=torch.int64)), model))
