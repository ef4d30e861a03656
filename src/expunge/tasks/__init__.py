"""Tasks: one file per kind of model. `task("classification")` finds one by name."""

from __future__ import annotations

from typing import Any

from expunge.errors import BadSetting, nearest
from expunge.tasks.base import Batch, Choice, Measurements, Output, PerExample, Task, evaluating, move_to_model
from expunge.tasks.classification import Classification
from expunge.tasks.diffusion import Diffusion
from expunge.tasks.gan import Gan, GanPair
from expunge.tasks.language import Language
from expunge.tasks.regression import Regression
from expunge.tasks.vae import Vae

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "diffusion": Diffusion,
    "gan": Gan,
    "language": Language,
    "regression": Regression,
    "vae": Vae,
}


def task(which: str | Task | dict[str, Any]) -> Task:
    """A task from its name, from a mapping `{name: ..., **settings}`, or itself."""
    if isinstance(which, Task):
        return which
    settings = dict(which) if isinstance(which, dict) else {"name": which}
    name = settings.pop("name", None)
    if name not in TASKS:
        raise BadSetting(f"expected a task, one of {', '.join(TASKS)}, found {name!r}.{nearest(str(name), TASKS)}")
    try:
        return TASKS[name](**settings)
    except TypeError as error:
        raise BadSetting(f"expected settings of the task '{name}', found {settings}; {error}") from error


__all__ = [
    "TASKS", "Batch", "Choice", "Classification", "Diffusion", "Gan", "GanPair", "Language", "Measurements", "Output", "PerExample",
    "Regression", "Task", "Vae", "evaluating", "move_to_model", "task",
]  # fmt: skip
