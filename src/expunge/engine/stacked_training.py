"""The loop that trains stacked models, and the same loop for one model at a time (its slow truth).

Everything is a function of explicit tensors: parameters and buffers are name -> (M, *shape) and are trained in place.
`ensemble.py` says what was chosen and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from expunge.engine.per_example import LossModule, rows_and_shared, vmap_problem
from expunge.engine.stacked_layers import StackedLayers
from expunge.seeds import derive, generator
from expunge.tasks.base import Batch, Task

if TYPE_CHECKING:
    from expunge.cases.data import Data
    from expunge.parts.plan import Optimizer, Training

State = dict[str, Tensor]


class Table:
    """The rows that any member uses, in memory on the models' device, fetched once."""

    def __init__(self, data: Data, members: list[Tensor], device: torch.device):
        self.ids = torch.cat(members).unique()
        self.device = device
        self.rows, self.shared = rows_and_shared(data.fetch(self.ids).to(device))

    def positions(self, ids: Tensor) -> Tensor:
        return torch.searchsorted(self.ids, ids)

    def fetch(self, index: Tensor) -> Batch:
        """Rows by position in this table; index (B,)."""
        where = index.to(self.device)
        return Batch(self.ids[index], {**self.shared, **{k: v[where] for k, v in self.rows.items()}})


# -- the schedule: which rows, which rate, at which step ---------------------------------------------------------------
def member_batches(rows: Tensor, training: Training, seed: int) -> Iterator[Tensor]:
    """Row positions of every step of one member, (<= batch_size,), reshuffled each epoch by the member's own seed.

    The stream of random numbers is that of `engine.fit` on a split named "member"; a test holds the two together.
    """
    phase = derive(seed, "phase", 0)
    for epoch in range(training.epochs):
        order = torch.randperm(len(rows), generator=generator(phase, "order", epoch, "member", 0))
        yield from rows[order].split(training.batch_size)


def learning_rate(optimizer: Optimizer, step: int, steps: int, epoch: int) -> float:
    """The rate of one step (counted from 0) out of `steps`. See `Optimizer` for the schedules."""
    warm = int(optimizer.warmup * steps)
    if step < warm:
        return optimizer.lr * (step + 1) / warm
    progress = (step - warm) / max(steps - warm, 1)
    if optimizer.schedule == "cosine":
        return optimizer.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if optimizer.schedule == "linear":
        return optimizer.lr * (1 - progress)
    if optimizer.schedule == "steps":
        return optimizer.lr * optimizer.decay ** sum(epoch >= m for m in optimizer.milestones)
    return optimizer.lr


def make_optimizer(settings: Optimizer, parameters: list[Tensor]) -> torch.optim.Optimizer:
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, **common)
    return (torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW)(parameters, **common)


# -- training ----------------------------------------------------------------------------------------------------------
def train_together(
    template: nn.Module, task: Task, table: Table, members: list[Tensor], training: Training, seeds: list[int],
    parameters: State, buffers: State,
) -> None:  # fmt: skip
    """Train the stacked `parameters` and `buffers` in place."""
    module = LossModule(template.train(), task)
    trainable = {k for k, p in template.named_parameters() if p.requires_grad}
    moving = [parameters[k].requires_grad_() for k in parameters if k in trainable]
    optimizer = make_optimizer(training.optimizer, moving)
    streams = [member_batches(rows, training, seed) for rows, seed in zip(members, seeds, strict=True)]
    per_epoch = [math.ceil(len(rows) / training.batch_size) for rows in members]
    totals = [training.epochs * n for n in per_epoch]
    padding = torch.stack([rows[0] for rows in members])

    def losses(p: State, b: State, ids: Tensor, rows: State) -> tuple[Tensor, State]:
        b = dict(b)  # batch norm writes running statistics into these tensors in place
        state = {f"model.{k}": v for k, v in (p | b).items()}
        with StackedLayers():
            return functional_call(module, state, (Batch(ids, {**table.shared, **rows}),))[0], b

    forward = vmap(losses, randomness="different")
    with torch.random.fork_rng(devices=[table.device] if table.device.type == "cuda" else []):
        torch.manual_seed(derive(seeds[0], "ensemble", "dropout"))
        for step in range(max(totals)):
            batches = [next(stream, padding[:0]) for stream in streams]
            rates = [
                learning_rate(training.optimizer, step, total, step // n) if step < total else 0.0
                for total, n in zip(totals, per_epoch, strict=True)
            ]
            index, weight = padded(batches, padding)
            ids, rows = stacked_rows(task, table, index, seeds, step)
            own = {k: v.clone() for k, v in buffers.items()}
            try:
                loss, own = forward(parameters, own, ids, rows)
            except RuntimeError as error:
                raise vmap_problem(error, "pass vectorised=False to train one model after another") from error
            if weight is None:
                total_loss = loss.mean(1).sum()
            else:
                # A real zero, not weight * loss: a padding row may have an infinite loss.
                weight = weight.to(table.device, loss.dtype)
                total_loss = (torch.where(weight > 0, loss, 0.0) * weight).sum()
            gradients = torch.autograd.grad(total_loss, moving, allow_unused=True)
            for value, gradient in zip(moving, gradients, strict=True):
                value.grad = gradient
            if training.optimizer.clip is not None:
                clip_each(moving, training.optimizer.clip)
            step_at_rates(optimizer, moving, rates)
            running = torch.tensor([step < total for total in totals], device=table.device)
            for name, value in own.items():
                buffers[name].copy_(torch.where(aligned(running, value), value, buffers[name]))
    for value in moving:
        value.requires_grad_(False).grad = None


def train_alone(model: nn.Module, task: Task, table: Table, rows: Tensor, training: Training, seed: int) -> None:
    """The slow truth: one ordinary model, ordinary autograd, the same batches and rates."""
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(training.optimizer, moving)
    per_epoch = math.ceil(len(rows) / training.batch_size)
    with torch.random.fork_rng(devices=[table.device] if table.device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "ensemble", "dropout"))
        for step, index in enumerate(member_batches(rows, training, seed)):
            batch = task.prepare(table.fetch(index), generator(seed, "ensemble", "prepare", step))
            optimizer.zero_grad(set_to_none=True)
            task.loss(task.forward(model, batch), batch).mean().backward()
            if training.optimizer.clip is not None:
                nn.utils.clip_grad_norm_(moving, training.optimizer.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training.optimizer, step, training.epochs * per_epoch, step // per_epoch)
            optimizer.step()


def padded(batches: list[Tensor], padding: Tensor) -> tuple[Tensor, Tensor | None]:
    """(M, B) row positions, and (M, B) weights 1/length on real rows (None where no batch needed padding)."""
    lengths = [len(b) for b in batches]
    width = max(lengths)
    if min(lengths) == width:
        return torch.stack(batches), None
    index = padding[:, None].repeat(1, width)
    weight = torch.zeros(len(batches), width, dtype=torch.float64)
    for i, (batch, length) in enumerate(zip(batches, lengths, strict=True)):
        if length:
            index[i, :length] = batch
            weight[i, :length] = 1.0 / length
    return index, weight


def stacked_rows(task: Task, table: Table, index: Tensor, seeds: list[int], step: int) -> tuple[Tensor, State]:
    """ids (M, B) and columns (M, B, ...). A task that draws noise draws each member's from that member's own seed."""
    if type(task).prepare is Task.prepare:
        where = index.to(table.device)
        return table.ids[index].to(table.device), {k: v[where] for k, v in table.rows.items()}
    each = [
        task.prepare(table.fetch(row), generator(seed, "ensemble", "prepare", step))
        for row, seed in zip(index, seeds, strict=True)
    ]
    rows = [rows_and_shared(batch)[0] for batch in each]
    return table.ids[index].to(table.device), {k: torch.stack([r[k] for r in rows]) for k in rows[0]}


def step_at_rates(optimizer: torch.optim.Optimizer, moving: list[Tensor], rates: list[float]) -> None:
    """One step in which member i moves at rates[i]; lerp returns its end points exactly, so rate 0 moves nothing."""
    top = max(rates)
    for group in optimizer.param_groups:
        group["lr"] = top
    if min(rates) == top:
        optimizer.step()
        return
    before = [value.detach().clone() for value in moving]
    optimizer.step()
    share = torch.tensor([rate / top for rate in rates], dtype=torch.float64)
    with torch.no_grad():
        for value, old in zip(moving, before, strict=True):
            value.copy_(torch.lerp(old, value, aligned(share.to(value), value)))


def clip_each(moving: list[Tensor], largest: float) -> None:
    """Scale every member's whole gradient to at most this norm, as `clip_grad_norm_` does for one model."""
    gradients = [value.grad for value in moving if value.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(aligned(scale, g))


def aligned(per_member: Tensor, like: Tensor) -> Tensor:
    """(M,) -> (M, 1, ..., 1), to broadcast against a stacked tensor."""
    return per_member.reshape(-1, *([1] * (like.dim() - 1)))
