"""Per-example losses and gradients by torch.func: what Fisher forgetting, SSD, influence and attacks read.

`vmap(grad(...))` over a batch costs one batched backward instead of B small ones. Inside it every example is a batch of
one, so a task's `loss(output, batch)` is used as it is. The model runs in the mode it is in: call `model.eval()` first
where dropout and batch statistics should be off. Batch norm with batch statistics has no per-example gradient (each
example's loss depends on the whole batch), so it is refused.

    g = per_example_gradients(model, task, batch)        # {"fc.weight": (B, 10, 64), "fc.bias": (B, 10)}
    fisher = squared_gradient_sum(model, task, split.batches())   # never holds (B, P) for more than one chunk

Columns whose first dimension is the batch's length are split into examples; everything else (graphs, codebooks, counts)
is shared by all examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from expunge.errors import BadModel, BadSetting, nearest
from expunge.tasks.base import Batch, Output, PerExample, Task, move_to_model

Loss = Callable[[Output, Batch], PerExample]


class LossModule(nn.Module):
    """A model together with its task as one module, because `functional_call` swaps parameters of a module call.

    forward(batch) -> ((B,) losses, output). Parameter names gain the prefix `model.`.
    """

    def __init__(self, model: nn.Module, task: Task, loss: Loss | None = None):
        super().__init__()
        self.model = model
        self.task = task
        self.loss = loss or task.loss

    def forward(self, batch: Batch) -> tuple[PerExample, Output]:
        output = self.task.forward(self.model, batch)
        return self.loss(output, batch), output


def rows_and_shared(batch: Batch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Columns with one entry per example (tensors of length B), and those that belong to the batch as a whole."""
    rows: dict[str, Tensor] = {}
    shared: dict[str, Any] = {}
    for name, value in batch.columns.items():
        per_row = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == len(batch)
        (rows if per_row else shared)[name] = value
    return rows, shared


def uses_batch_statistics(model: nn.Module) -> list[str]:
    """Names of layers that, in their present mode, mix the examples of a batch or write running statistics."""
    found = []
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        tracking_instance = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        if (batch_norm and (module.training or module.running_mean is None)) or (tracking_instance and module.training):
            found.append(name or type(module).__name__)
    return found


def vmap_problem(error: RuntimeError, remedy: str) -> RuntimeError | BadModel:
    """A `BadModel` where torch says that an operation cannot be vectorised; any other error unchanged."""
    text = str(error)
    if any(word in text for word in ("vmap", "functorch", "BatchedTensor", "data-dependent")):
        return BadModel(
            "expected a model whose operations can be vectorised by torch.func.vmap, found: "
            f"{text.splitlines()[0]}; {remedy}"
        )
    return error


def per_example_losses(model: nn.Module, task: Task, batch: Batch, loss: Loss | None = None) -> PerExample:
    """(B,) the task's loss, without gradient, in the mode the model is in."""
    with torch.no_grad():
        return LossModule(model, task, loss)(move_to_model(batch, model))[0]


def per_example_gradients(
    model: nn.Module,
    task: Task,
    batch: Batch,
    names: Sequence[str] | None = None,
    chunk: int | None = None,
    *,
    loss: Loss | None = None,
    vectorised: bool = True,
) -> dict[str, Tensor]:
    """Gradient of each example's loss with respect to each parameter.

    Args:
        names: parameters to differentiate; default: those with requires_grad. A frozen one may be named.
        chunk: examples differentiated at once (memory is chunk x P); default: all.
        loss: (output, batch) -> (B,) to differentiate instead of the task's loss.
        vectorised: False loops over examples, for models that vmap cannot run.

    Returns: name -> (B, *shape of the parameter), detached, on the model's device.
    """
    if chunk is not None and chunk < 1:
        raise BadSetting(
            f"expected chunk to be at least 1 example or None for all, found {chunk}; pass a positive number"
        )
    parameters = chosen_parameters(model, names)
    batch = move_to_model(batch, model)
    refuse_batch_statistics(model)
    if len(batch) == 0:
        return {name: p.new_zeros((0, *p.shape)) for name, p in parameters.items()}
    module = LossModule(model, task, loss)
    rows, shared = rows_and_shared(batch)

    def one(values: dict[str, Tensor], index: Tensor, row: dict[str, Tensor]) -> Tensor:
        single = Batch(index[None], {**shared, **{k: v[None] for k, v in row.items()}})
        return functional_call(module, {f"model.{k}": v for k, v in values.items()}, (single,))[0].sum()

    values = {name: p.detach() for name, p in parameters.items()}
    ids = batch.ids.to(next(iter(values.values())).device)
    if not vectorised:
        single_gradient = grad(one)
        each = [single_gradient(values, ids[i], {k: v[i] for k, v in rows.items()}) for i in range(len(batch))]
        return {name: torch.stack([g[name] for g in each]).detach() for name in values}
    try:
        many = vmap(grad(one), in_dims=(None, 0, 0), randomness="different", chunk_size=chunk)
        return {name: g.detach() for name, g in many(values, ids, rows).items()}
    except RuntimeError as error:
        raise vmap_problem(error, "pass vectorised=False to loop over the examples") from error


def gradient_matrix(
    model: nn.Module,
    task: Task,
    batch: Batch,
    names: Sequence[str] | None = None,
    chunk: int | None = None,
    **options: Any,
) -> Tensor:
    """(B, P) per-example gradients, parameters flattened and concatenated in the order of `named_parameters`."""
    gradients = per_example_gradients(model, task, batch, names, chunk, **options)
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def squared_gradient_sum(
    model: nn.Module,
    task: Task,
    batches: Batch | Iterable[Batch],
    names: Sequence[str] | None = None,
    chunk: int = 64,
    *,
    loss: Loss | None = None,
    vectorised: bool = True,
) -> dict[str, Tensor]:
    """sum_i g_i^2 over all examples: the diagonal empirical Fisher times the number of examples.

    Memory is `chunk` x P: only the running sum outlives a chunk. Returns name -> shape of the parameter.
    """
    totals = {name: torch.zeros_like(p.detach()) for name, p in chosen_parameters(model, names).items()}
    for batch in [batches] if isinstance(batches, Batch) else batches:
        for part in pieces(batch, chunk):
            gradients = per_example_gradients(model, task, part, list(totals), loss=loss, vectorised=vectorised)
            for name, g in gradients.items():
                totals[name] += g.square().sum(0)
    return totals


def pieces(batch: Batch, size: int) -> Iterable[Batch]:
    """The batch cut into consecutive batches of at most `size` examples; shared columns go to each."""
    if size < 1:
        raise BadSetting(f"expected chunk to be at least 1 example, found {size}; pass a positive number")
    rows, shared = rows_and_shared(batch)
    for start in range(0, len(batch), size):
        cut = slice(start, start + size)
        yield Batch(batch.ids[cut], {**shared, **{k: v[cut] for k, v in rows.items()}})


def chosen_parameters(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The named parameters (default: trainable ones), in the model's own order."""
    known = dict(model.named_parameters())
    if names is None:
        chosen = {name: p for name, p in known.items() if p.requires_grad}
        if not chosen:
            raise BadModel(
                "expected at least one parameter with requires_grad, found none; unfreeze some or pass names=[...]"
            )
        return chosen
    for name in names:
        if name not in known:
            raise BadSetting(
                f"expected names of parameters, found '{name}'.{nearest(name, known)} "
                "List them with model.named_parameters()"
            )
    if not names:
        raise BadSetting("expected at least one parameter name, found an empty list; pass None for all trainable ones")
    return {name: p for name, p in known.items() if name in set(names)}


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise `BadModel` where examples of a batch influence each other."""
    layers = uses_batch_statistics(model)
    if layers:
        raise BadModel(
            "expected each example's loss to depend on that example alone, found batch statistics in use at "
            f"{', '.join(layers[:3])}; call model.eval() first (with tracked running statistics), or use GroupNorm"
        )
