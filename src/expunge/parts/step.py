"""What an objective sees: one batch of one split at one step, with the forward pass made once and shared by its terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.errors import BadSetting, nearest
from expunge.tasks.base import Batch, Output, PerExample, Task

if TYPE_CHECKING:
    from expunge.parts.latents import Shift
    from expunge.parts.references import References


@contextmanager
def capturing(model: nn.Module, layers: Sequence[str]):
    """Collect the outputs of named submodules during a forward: `with capturing(model, ["fc1"]) as seen: ...`.

    "fc2.input" names what goes into fc2, which need not be any module's output (`self.fc2(F.relu(...))`).
    """
    seen: dict[str, Tensor] = {}
    modules = dict(model.named_modules()) if layers else {}
    if layers and type(model).__module__.startswith("peft"):  # names are those of the model that wears the adapters
        modules |= dict(model.model.named_modules())  # type: ignore[union-attr, operator]
    hooks = []
    for name in layers:
        owner = name.removesuffix(".input")
        if name not in modules and owner != name and owner in modules:

            def keep_input(_module: nn.Module, inputs: Any, name: str = name) -> None:
                seen[name] = inputs[0]

            hooks.append(modules[owner].register_forward_pre_hook(keep_input))
            continue
        if name not in modules:
            raise BadSetting(
                f"expected a layer of the model, found '{name}'.{nearest(name, modules)} "
                f"Layers: {', '.join(k for k in list(modules)[1:9])}, ..."
            )

        def keep(_module: nn.Module, _inputs: Any, result: Any, name: str = name) -> None:
            seen[name] = result[0] if isinstance(result, tuple) else result

        hooks.append(modules[name].register_forward_hook(keep))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Joint:
    """One forward over the rows of several splits at once: a mixed batch is one batch to batch norm, as in the papers that
    mix. Each step then sees its own rows of the output."""

    def __init__(self, steps: Sequence[Step]):
        self.steps = list(steps)

    def run(self) -> None:
        first, sizes = self.steps[0], [len(s.batch) for s in self.steps]
        batch = first.task.joined([s.batch for s in self.steps])
        layers = sorted({layer for s in self.steps for layer in s.layers})
        with capturing(first.model, layers) as seen:
            output = first.task.forward(first.model, batch)
        start = 0
        for step, size in zip(self.steps, sizes, strict=True):
            rows = slice(start, start + size)
            extra = {
                k: v[rows] if isinstance(v, Tensor) and v.shape[:1] == (sum(sizes),) else v
                for k, v in output.extra.items()
            }
            step._output = output.part(rows, extra)
            step._features = {k: v[rows] for k, v in seen.items()}
            start += size


@dataclass
class Step:
    """One batch of one split at one step.

    model: the network under training. networks: all of the method's networks by name ("model" is the user's).
    output: the model's output, computed on first use and shared. features: layer name -> (B, ...) activations.
    references: the frozen models, as cheap as the objective allows.
    draws: a CPU generator of this step and split, or what makes one: few steps draw, and only those pay for it.
    epoch counts from 0, progress runs 0..1 over the whole plan.
    peers: the steps of the other splits of the same joint update.
    shift: what a latent adversary adds to activations (`parts.latents.Shift`). clean: the step before an attack on it.
    """

    model: nn.Module
    task: Task
    batch: Batch
    references: References
    draws: torch.Generator | Callable[[], torch.Generator]
    split: str = "forget"
    epoch: int = 0
    progress: float = 0.0
    layers: tuple[str, ...] = ()
    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    peers: dict[str, Step] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict)
    joint: Joint | None = None
    mean: Callable[[Tensor], Tensor] = torch.mean
    """(B,) -> () over the whole batch, of which several processes have a part each."""
    shift: Shift | None = None
    clean: Step | None = None
    _output: Output | None = None
    _features: dict[str, Tensor] = field(default_factory=dict)
    _rng: torch.Generator | None = None

    def __post_init__(self) -> None:
        if isinstance(self.draws, torch.Generator):
            self._rng, state = self.draws, self.draws.get_state()
            self.draws = lambda: torch.Generator().set_state(state)

    @property
    def rng(self) -> torch.Generator:
        """The step's generator, made on first use."""
        if self._rng is None:
            self._rng = self.draws()  # type: ignore[operator]
        return self._rng

    @rng.setter
    def rng(self, other: torch.Generator) -> None:
        self._rng = other

    @property
    def output(self) -> Output:
        if self._output is None and self.joint is not None:
            self.joint.run()
        if self._output is None and self.shift is None and not self.layers:
            self._output = self.task.forward(self.model, self.batch)
        elif self._output is None:
            with self._attacked(self.batch), capturing(self.model, self.layers) as seen:
                self._output = self.task.forward(self.model, self.batch)
            self._features = seen
        return self._output

    def forward(self, batch: Batch) -> Output:
        """The model on another batch of this step's rows (other answers), under the same latent attack."""
        with self._attacked(batch):
            return self.task.forward(self.model, batch)

    def _attacked(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext() if self.shift is None else self.shift.on(self.model, batch)

    @property
    def features(self) -> dict[str, Tensor]:
        """Activations of the layers that the step's objectives asked for."""
        _ = self.output
        return self._features

    @property
    def loss(self) -> PerExample:
        """(B,) the task's loss of the model on this batch, computed once."""
        if "loss" not in self.scratch:
            self.scratch["loss"] = self.task.loss(self.output, self.batch)
        return self.scratch["loss"]

    def reference_output(self, name: str) -> Output:
        """What a frozen model says about this batch (no gradient)."""
        return self.references.output(name, self.batch, self.split)

    def reference_loss(self, name: str) -> PerExample:
        """(B,) the loss of a frozen model: scalars from the cache where that suffices."""
        return self.references.loss(name, self.batch, self.split)

    def reference_features(self, name: str) -> dict[str, Tensor]:
        """Activations of a frozen model at the step's layers (no gradient)."""
        return self.references.features(name, self.batch, self.layers)

    def again(self) -> Step:
        """The same batch without the cached forward, with the same draws to come: what an adversary uses after moving weights
        or inputs, so that all its passes see one relabelling."""
        return Step(
            self.model, self.task, self.batch, self.references, self.draws, self.split, self.epoch, self.progress,
            self.layers, self.networks, self.peers, shift=self.shift,
            clean=None if self.clean is None else self.clean.again(), mean=self.mean,
        )  # fmt: skip
