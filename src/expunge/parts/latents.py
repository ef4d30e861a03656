"""An adversary in latent space: it adds to hidden activations what hurts most, and the weights learn to behave under it.

Paper: Sheshadri et al., "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs", TMLR 2025,
2407.15549. With h_l the outputs of the attacked modules,

    max_delta  harm( model with h_l + delta_l )    such that  ||delta_l[b, t]||_2 <= epsilon  for every example and token

by AdamW on delta from zero, the weights held still; then `repeats` updates of the weights under that delta. Targeted: harm is
minus the adversary's own `goal`. Untargeted: harm is what the plan's terms on that split minimise. Other splits are not touched.

Where we differ: the published step of 5e-2 per coordinate reaches the sphere at once on a width of 4096; by default a step here
is epsilon / (2 sqrt(d)), which takes two. Padding is never perturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import BadSetting, nearest
from expunge.parts.adversaries import Adversary
from expunge.parts.step import capturing
from expunge.tasks.base import Task, evaluating, held_still, move_to_model

if TYPE_CHECKING:
    from expunge.cases.data import Split
    from expunge.parts.plan import Term
    from expunge.parts.step import Step
    from expunge.tasks.base import Batch

WHERE = ("all", "prompt", "answer")


@dataclass
class Shift:
    """What is added to the outputs of named modules. deltas: module name -> (B, T, d), (B, d) or (B, C, H, W), made as zeros on
    the first forward. where: which positions, of those that are not padding."""

    task: Task
    names: tuple[str, ...]
    where: str = "all"
    deltas: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def on(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """While open, `model` runs `batch` with the deltas added."""
        modules, mask = dict(model.named_modules()), positions(self.task, batch, self.where)
        hooks = [modules[name].register_forward_hook(self._adds(name, mask)) for name in self.names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _adds(self, name: str, mask: Tensor | None) -> Callable[..., Any]:
        def add(_module: nn.Module, _inputs: Any, result: Any) -> Any:
            activation = result[0] if isinstance(result, tuple) else result
            if name not in self.deltas:
                kind = torch.promote_types(activation.dtype, torch.float32)  # halves are too coarse for small steps
                self.deltas[name] = torch.zeros_like(activation, dtype=kind).detach().requires_grad_(True)
            shifted = activation + fitted(self.deltas[name], activation, mask).to(activation.dtype)
            return (shifted, *result[1:]) if isinstance(result, tuple) else shifted

        return add


def positions(task: Task, batch: Batch, where: str) -> Tensor | None:
    """(B, T) bool, where a delta counts; None where activations have no positions."""
    real, spots = task.real(batch), task.spots(batch)
    if real is None or spots is None or where == "all":
        return real
    chosen = real & (spots if where == "answer" else ~spots)
    if not bool(chosen.any()):
        raise BadSetting(
            f"expected tokens of the {where} to perturb, found none in a batch; plain text is all answer: use where='all'"
        )
    return chosen


def fitted(delta: Tensor, activation: Tensor, mask: Tensor | None) -> Tensor:
    """The delta for an activation (B, T', d) of the same rows with other answers: position by position, none beyond its end."""
    if mask is None:
        return delta
    missing = activation.shape[1] - delta.shape[1]
    same = F.pad(delta, (0, 0, 0, missing)) if missing > 0 else delta[:, : activation.shape[1]]
    return same * mask[..., None]


def token_norms(value: Tensor) -> Tensor:
    """L2 norm of each token: over the last dimension, of pictures (B, C, H, W) over the channels."""
    return torch.linalg.vector_norm(value, dim=1 if value.dim() == 4 else -1, keepdim=True)


@torch.no_grad()
def project(delta: Tensor, epsilon: float) -> None:
    """Every token back into its ball, in place."""
    delta.mul_((epsilon / token_norms(delta).clamp_min(1e-12)).clamp(max=1.0))


@dataclass(frozen=True)
class LatentAttack(Adversary):
    """See the module's text. layers: names of modules (`*` allowed) whose outputs are perturbed. lr: of AdamW, per coordinate.

    goal: terms on `on` that the adversary minimises, their weights taken relative to the sum; none: it maximises the plan's own.
    """

    layers: tuple[str, ...]
    epsilon: float = 2.0
    steps: int = 16
    lr: float | None = None
    goal: tuple[Term, ...] = ()
    where: str = "all"
    repeats: int = 4
    on: str = "forget"
    space = "latents"

    def __post_init__(self) -> None:
        if self.epsilon < 0 or self.steps < 1 or self.repeats < 1 or not (self.lr is None or self.lr > 0):
            raise BadSetting(
                f"expected epsilon >= 0, steps >= 1, repeats >= 1 and lr > 0, found {self.epsilon}, {self.steps}, "
                f"{self.repeats} and {self.lr}; correct them"
            )
        if self.where not in WHERE:
            raise BadSetting(f"expected where to be one of {', '.join(WHERE)}, found {self.where!r}; use one of them")
        astray = [str(term) for term in self.goal if term.on != self.on]
        if astray:
            raise BadSetting(f"expected the goal's terms on '{self.on}', found {', '.join(astray)}; attack one split")

    def attack(self, step: Step, harm: Callable[[Step], Tensor]) -> Step:
        if self.epsilon == 0:
            return step
        if any(getattr(module, "gradient_checkpointing", False) for module in step.model.modules()):
            raise BadSetting(
                "expected activations that are kept for the backward pass, found gradient checkpointing, which would compute "
                "them again without the perturbation; turn it off (model.gradient_checkpointing_disable())"
            )
        shift = Shift(step.task, matching(step.model, self.layers), self.where)
        optimizer: torch.optim.Optimizer | None = None
        with held_still(step.model):
            for _ in range(self.steps):
                loss = -harm(attacked(step, shift))
                deltas = list(shift.deltas.values())
                if not loss.requires_grad:
                    raise BadSetting(
                        f"expected the attacked layers ({', '.join(shift.names)}) to come before what the terms on "
                        f"'{self.on}' read, found that no perturbation reaches them; attack an earlier layer"
                    )
                optimizer = optimizer or torch.optim.AdamW([self._group(d) for d in deltas])
                for delta, g in zip(deltas, torch.autograd.grad(loss, deltas, allow_unused=True), strict=True):
                    delta.grad = g
                optimizer.step()
                for delta in deltas:
                    project(delta, self.epsilon)
        shift.deltas = {name: delta.detach() for name, delta in shift.deltas.items()}
        return attacked(step, shift)

    def _group(self, delta: Tensor) -> dict[str, Any]:
        width = delta.shape[1 if delta.dim() == 4 else -1]
        return {"params": [delta], "lr": self.epsilon / (2 * width**0.5) if self.lr is None else self.lr}

    def __str__(self) -> str:
        goal = f", {' + '.join(map(str, self.goal))}" if self.goal else ""
        return f"latent({','.join(self.layers)}; ε={self.epsilon:g}, {self.steps}{goal})"


def attacked(step: Step, shift: Shift) -> Step:
    """The step under a shift; it remembers itself without."""
    hard = step.again()
    hard.shift, hard.clean = shift, step
    return hard


def matching(model: nn.Module, layers: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that the names mean, in the model's order; adapters put a prefix before them."""
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in layers:
        hits = {n for n in names if fnmatchcase(n.removeprefix("base_model.").removeprefix("model."), pattern)}
        hits = {n for n in names if fnmatchcase(n, pattern)} or hits
        if not hits:
            raise BadSetting(
                f"expected a layer of the model, found '{pattern}'.{nearest(pattern, names)} "
                f"Layers: {', '.join(names[:8])}, ..."
            )
        found |= hits
    return tuple(n for n in names if n in found)


def latent(
    layers: str | tuple[str, ...] | list[str],
    epsilon: float = 2.0,
    steps: int = 16,
    lr: float | None = None,
    goal: Term | tuple[Term, ...] = (),
    where: str = "all",
    repeats: int = 4,
    on: str = "forget",
) -> LatentAttack:
    """Worst-case activations at `layers` (module names) within an L2 ball of `epsilon` around every token.

    goal: what the adversary minimises (targeted); none: it maximises the attacked terms. where: "all" tokens, the "prompt" or the
    "answer". repeats: updates of the weights under one perturbation. epsilon: in the activation's unit; see `usual_norm`.
    """
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    terms = goal if isinstance(goal, tuple) else (goal,)
    return LatentAttack(names, epsilon, steps, lr, terms, where, repeats, on)


def usual_norm(task: Task, model: nn.Module, split: Split, layer: str, rows: int = 256) -> float:
    """Median L2 norm of a token (padding left out) at a module's output, over the first rows of a split: a radius in the
    activation's own unit."""
    found = []
    for batch in split.batches(32):
        batch = move_to_model(batch, model)
        with evaluating(model), capturing(model, matching(model, (layer,))) as seen:
            task.forward(model, batch)
        (activation,) = seen.values()
        norms, real = token_norms(activation), task.real(batch)
        found.append((norms if real is None else norms[real]).flatten())
        rows -= len(batch)
        if rows <= 0:
            break
    return float(torch.cat(found).median()) if found else 0.0
