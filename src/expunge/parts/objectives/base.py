"""What an objective is: a per-example loss that a term minimises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expunge.tasks.base import Batch, Output, PerExample

if TYPE_CHECKING:
    from expunge.parts.step import Step


class Objective:
    """Base of all objectives. Subclasses are frozen dataclasses: equal settings, equal objective.

    reads: what it reads of which reference, e.g. (("original", "loss"),); one of loss, output, features. The engine makes
        that available as cheaply as it can.
    layers: names of submodules whose activations it reads (`step.features`).
    beside: other splits of the same update whose steps it reads (`step.peers`).
    needs: what the case must have beyond the splits, by the names of `methods.registry.NEEDS`.
    """

    reads: tuple[tuple[str, str], ...] = ()
    layers: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def prepare(self, workbench: Any, split: str) -> Any:
        """Called once before the first step with the model as it is then; what it returns is `step.scratch["memory"]`.

        It must be a function of the workbench's seed and model only, because a resumed run calls it again."""
        return None

    def __call__(self, step: Step) -> PerExample:
        """(B,) lower is what the term wants."""
        raise NotImplementedError

    def __str__(self) -> str:
        return type(self).__name__.lower()


def answered(step: Step, batch: Batch) -> Output:
    """The model's output on the step's batch with other answers. Where an answer is no input (a classifier's label), the
    inputs are the step's own tensor and so is the output; a language model reads the answer, and runs again."""
    name = step.task.input
    own = name in batch.columns and batch[name] is step.batch[name]
    return step.output if own else step.forward(batch)
