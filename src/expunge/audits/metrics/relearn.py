"""How fast the forgotten comes back when the model is trained on it again.

    relearn time = optimiser steps on training data until the forget data is as well known as a target says
    AIN          = relearn_time(U) / relearn_time(R)       target: within `margin` (5%) of the original's performance

AIN (anamnesis index; bad teaching, deep regression unlearning, arXiv 2210.08196): near 1 is ideal, below 1 something
was left, above 1 the model was scrubbed so hard that it shows. Relearning uses the full training set, forget rows
included. Golatkar's relearn time (arXiv 1911.04933) fine-tunes on 500 random training points an epoch by SGD until the
mean loss on the forget data falls to a threshold.

The official notebook lets one gold model relearn three times without copying it, which inflates later ratios. Here
every model is copied first, and all see the same batches in the same order under the same seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from expunge.audits.base import Measured, Measurement, check
from expunge.errors import BadSetting
from expunge.seeds import derive, generator
from expunge.tasks.base import Task, evaluating, move_to_model

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.data import Split

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def steps_to_reach(
    model: nn.Module,
    task: Task,
    train: Split,
    reached: Callable[[nn.Module], bool],
    *,
    seed: int = 0,
    optimizer: str = "adam",
    lr: float = 1e-3,
    batch_size: int = 256,
    max_steps: int = 500,
    per_epoch: int | None = None,
    every: int = 1,
) -> int | None:
    """Optimiser steps on `train` until `reached(copy of model)`, asked before the first step and after each `every`-th.

    per_epoch: random rows an epoch, None for all. None where `max_steps` did not suffice. The given model is not
    changed.
    """
    if optimizer not in OPTIMIZERS:
        raise BadSetting(f"expected an optimizer, one of {', '.join(OPTIMIZERS)}, found {optimizer!r}; use one of them")
    if len(train) == 0 or max_steps < 0 or every < 1:
        raise BadSetting(
            f"expected training rows, max_steps >= 0 and every >= 1, found {len(train)} rows, {max_steps} and "
            f"{every}; correct them"
        )
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if reached(model):
        return 0
    mover = OPTIMIZERS[optimizer](model.parameters(), lr=lr)
    step, epoch = 0, 0
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(derive(seed, "relearn", "layers"))
        while True:
            rows = train if per_epoch is None else train.sample(per_epoch, generator(seed, "relearn", "rows", epoch))
            for batch in rows.shuffled(generator(seed, "relearn", "order", epoch), batch_size):
                if step == max_steps:
                    return None
                model.train()
                batch = move_to_model(task.prepare(batch, generator(seed, "relearn", "draws", step)), model)
                mover.zero_grad(set_to_none=True)
                task.loss(task.forward(model, batch), batch).mean().backward()
                mover.step()
                step += 1
                if step % every == 0:
                    for module, training in modes:
                        module.training = training
                    if reached(model):
                        return step
            epoch += 1


def anamnesis_index(unlearned: int | None, retrained: int | None, max_steps: int) -> tuple[float, str]:
    """AIN and a note from two relearn times; None (not reached) counts as `max_steps`, which bounds the ratio.

    Two zeros are 1: neither had anything to relearn. A retrained time of 0 alone gives infinity.
    """
    note = ""
    if unlearned is None or retrained is None:
        who = " and ".join(name for name, time in (("the model", unlearned), ("retrained", retrained)) if time is None)
        note = f"not reached in {max_steps} steps by {who}; counted as {max_steps}"
    u, r = (max_steps if time is None else time for time in (unlearned, retrained))
    if r == 0:
        return (1.0 if u == 0 else float("inf")), "retrained needs no step: there was nothing to relearn"
    return u / r, note


def mean_loss(model: nn.Module, task: Task, split: Split, seed: int = 0, batch_size: int = 512) -> float:
    """Mean loss on a split, in eval mode, with the same draws for every model."""
    parts = []
    with evaluating(model):
        for number, batch in enumerate(split.batches(batch_size)):
            batch = move_to_model(task.prepare(batch, generator(seed, "audit", split.name, number)), model)
            parts.append(task.loss(task.forward(model, batch), batch).double().cpu().numpy())
    return float(np.concatenate(parts).mean())


@check(
    "ain",
    direction="match",
    range=(0.0, None),
    needs=("retrained", "forget"),
    source="arXiv 2210.08196 (anamnesis index)",
)
def ain(
    subjects: Subjects,
    split: str = "forget",
    margin: float = 0.05,
    optimizer: str = "adam",
    lr: float = 1e-3,
    batch_size: int = 256,
    max_steps: int = 300,
    every: int = 1,
) -> list[Measurement]:
    """Anamnesis index: relearn time over the retrained model's; near 1 ideal, below 1 residual, above 1 over-scrubbed.

    split: where performance is asked ("forget", or "holdout" as deep regression unlearning does). The target is
    accuracy >= (1 - margin) * original's for classification, loss <= (1 + margin) * original's for other kinds.
    """
    case, task = subjects.case, subjects.task
    where = case.split(split)
    if task.name == "classification":
        target = (1 - margin) * subjects.evaluate("original", split)["accuracy"]

        def reached(model: nn.Module) -> bool:
            return task.evaluate(model, where.batches(512))["accuracy"] >= target
    else:
        target = (1 + margin) * float(subjects.losses("original", split).mean())

        def reached(model: nn.Module) -> bool:
            return mean_loss(model, task, where, subjects.seed) <= target

    times = {
        subject: steps_to_reach(
            subjects.model(subject),
            task,
            case.split("train"),
            reached,
            seed=subjects.seed,
            optimizer=optimizer,
            lr=lr,
            batch_size=batch_size,
            max_steps=max_steps,
            every=every,
        )
        for subject in subjects.compared
    }
    ratios = {subject: anamnesis_index(time, times["retrained"], max_steps) for subject, time in times.items()}
    values = {subject: ratio for subject, (ratio, _) in ratios.items()} | {"retrained": 1.0}
    if "floor" in values:
        values["floor"] = abs(values["floor"] - 1)
    steps = ", ".join(f"{subject} {'>' + str(max_steps) if time is None else time}" for subject, time in times.items())
    note = "; ".join(part for part in (ratios["unlearned"][1], f"steps: {steps}") if part)
    return [ain.measurement(Measured(values), split=split, note=note)]


@check(
    "relearn_time",
    unit="steps",
    direction="match",
    range=(0.0, None),
    needs=("retrained", "forget"),
    source="Golatkar et al., arXiv 1911.04933",
)
def relearn_time(
    subjects: Subjects,
    threshold: float = 0.1,
    optimizer: str = "sgd",
    lr: float = 0.01,
    per_epoch: int = 500,
    batch_size: int = 64,
    max_steps: int = 400,
    every: int = 1,
) -> list[Measurement]:
    """Steps of fine-tuning on training data until the mean loss on the forget data falls to `threshold`."""
    case, task = subjects.case, subjects.task
    forget = case.split("forget")
    times = {
        subject: steps_to_reach(
            subjects.model(subject),
            task,
            case.split("train"),
            lambda model: mean_loss(model, task, forget, subjects.seed) <= threshold,
            seed=subjects.seed,
            optimizer=optimizer,
            lr=lr,
            batch_size=batch_size,
            max_steps=max_steps,
            per_epoch=per_epoch,
            every=every,
        )
        for subject in subjects.compared
    }
    late = [subject for subject, time in times.items() if time is None]
    measured = subjects.compute(lambda subject: max_steps if times[subject] is None else times[subject])
    note = f"not reached in {max_steps} steps, counted as {max_steps}: {', '.join(late)}" if late else ""
    return [relearn_time.measurement(measured, split="forget", note=note)]
