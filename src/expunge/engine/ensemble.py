"""Many models at once: shadow models of an attack, retrained models of a gold, trained together by torch.func.

A small model leaves most of a processor waiting. Here the parameters of M models are stacked to (M, ...) tensors, one
`vmap` forward runs all of them, each on its own batch, and one backward of the summed losses gives every model its own
gradient, because no model's loss reads another's weights. SGD, momentum, Adam and AdamW are elementwise, so one
torch.optim optimizer on the stacked tensors is exactly M optimizers.

    shadows = Ensemble.train(case.fresh, case.task, data, members, training, seeds=range(64))
    margins = shadows.signals(split, "margin")        # (64, N)

What had to be chosen:

* **Members of unequal size.** Epochs are counted per member: member i makes epochs * ceil(N_i / batch_size) steps, as
  it would alone. Shorter batches are padded with rows of weight 0 and each loss is the weighted mean over real rows,
  so the gradient is exactly that of the short batch. A member that has made its steps stays as it is while others go
  on. (Counting steps for all alike would give small members more epochs, hence more memorisation, and a shadow attack
  would measure that.)
* **Learning rates.** A schedule depends on a member's own number of steps, so rates can differ between members. Every
  optimizer here moves weights in proportion to its rate, hence: step with the largest rate, then interpolate between
  old and new weights. Where all rates agree (nearly always) nothing is interpolated.
* **Batch norm.** Running statistics are stacked like parameters. Padding rows would enter batch statistics, so members
  of such models are trained together only with members of equal size.
* **Shuffling** is that of `engine.fit` on a split named "member": member i equals `fit(case, Split("member", data,
  rows_i), seeds[i])` up to rounding (and up to dropout, whose draws differ).
* **Convolutions.** On CPU they and max pooling run in a layout of their own (`stacked_layers.py`).
* **Memory.** All rows that any member uses are held in memory at once. `chunk` bounds how many models are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from expunge.engine.per_example import LossModule, uses_batch_statistics, vmap_problem
from expunge.engine.stacked_layers import StackedLayers
from expunge.engine.stacked_training import State, Table, train_alone, train_together
from expunge.errors import BadData, BadSetting, nearest
from expunge.seeds import derive, generator
from expunge.tasks.base import Batch, Output, Task, evaluating

if TYPE_CHECKING:
    from expunge.cases.data import Data, Split
    from expunge.parts.plan import Training

Build = Callable[[], nn.Module] | Callable[[int], nn.Module]


class Ensemble:
    """M models of one architecture with stacked state.

    parameters, buffers: name -> (M, *shape). `template` is an ordinary model that gives class, structure and keys.
    """

    def __init__(self, template: nn.Module, task: Task, parameters: State, buffers: State, chunk: int | None = None):
        self.template = template
        self.task = task
        self.parameters = parameters
        self.buffers = buffers
        self.chunk = chunk

    @classmethod
    def from_models(cls, models: Sequence[nn.Module], task: Task, chunk: int | None = None) -> Ensemble:
        """Stack models that exist already (all of one architecture), for inference on all at once."""
        if not models:
            raise BadSetting("expected at least one model, found none; pass a non-empty list")
        return cls(copy.deepcopy(models[0]), task, *stacked(models), chunk)

    @classmethod
    def train(
        cls,
        build: Build,
        task: Task,
        data: Data,
        members: Sequence[Tensor] | Tensor,
        training: Training,
        seeds: Sequence[int],
        chunk: int | None = None,
        *,
        vectorised: bool = True,
    ) -> Ensemble:
        """Train one model per member of `members`, each from its own seed.

        Args:
            build: `fresh(seed)` (e.g. `case.fresh`), or a factory without arguments, called under a seed of its own.
            members: row numbers per model, or a boolean (M, len(data)) mask.
            seeds: one per model; decides initialisation and shuffling. Equal seed and rows, equal model.
            chunk: models trained at once; default all.
            vectorised: False trains one after another by ordinary autograd: the slow truth, and the way for models that
                vmap cannot run.
        """
        rows = member_rows(members, len(data))
        seeds = [int(s) for s in seeds]
        check_training(rows, training, seeds, chunk)
        models = [fresh_model(build, seed) for seed in seeds]
        template = models[0]
        table = Table(data, rows, next(template.parameters()).device)
        local = [table.positions(r) for r in rows]
        if not vectorised:
            for model, own, seed in zip(models, local, seeds, strict=True):
                train_alone(model.train(), task, table, own, training, seed)
            return cls(template, task, *stacked(models), chunk)
        groups = grouped([len(r) for r in rows], chunk, bool(uses_batch_statistics(template.train())))
        parameters, buffers = stacked(models)
        del models
        for group in groups:
            index = torch.tensor(group, device=table.device)
            part = {k: v[index] for k, v in parameters.items()}, {k: v[index] for k, v in buffers.items()}
            train_together(
                template, task, table, [local[i] for i in group], training, [seeds[i] for i in group], *part
            )  # fmt: skip
            for whole, trained in zip((parameters, buffers), part, strict=True):
                for name, value in trained.items():
                    whole[name][index] = value.detach()
        return cls(template, task, parameters, buffers, chunk)

    def __len__(self) -> int:
        return int(next(iter(self.parameters.values())).shape[0])

    def model(self, i: int) -> nn.Module:
        """Member i as an ordinary module: same class and keys as the factory's, in eval mode."""
        model = copy.deepcopy(self.template).eval()
        with torch.no_grad():
            for own, state in ((model.named_parameters(), self.parameters), (model.named_buffers(), self.buffers)):
                for name, value in own:
                    value.copy_(state[name][i])
        return model

    def models(self) -> list[nn.Module]:
        return [self.model(i) for i in range(len(self))]

    def outputs(self, split: Split, batch_size: int = 512) -> Iterator[tuple[Batch, Output]]:
        """Each batch of the split in order, with an output whose tensors are (M, B, ...); no gradient, eval mode.

        A stochastic task's draw is the same for all members, so that their signals are comparable."""
        module = _Forward(LossModule(self.template, self.task))
        device = next(iter(self.parameters.values())).device

        def one(parameters: State, buffers: State, batch: Batch) -> tuple[Tensor, State]:
            state = {f"inner.model.{k}": v for k, v in (parameters | buffers).items()}
            with StackedLayers():
                output = functional_call(module, state, (batch,))
            return output.prediction, {k: v for k, v in output.extra.items() if isinstance(v, Tensor)}

        step = self.chunk or len(self)
        with evaluating(self.template):
            for number, batch in enumerate(split.batches(batch_size)):
                batch = self.task.prepare(batch.to(device), generator(0, "ensemble", "outputs", number))
                parts = []
                for start in range(0, len(self), step):
                    state = [
                        {k: v[start : start + step] for k, v in s.items()} for s in (self.parameters, self.buffers)
                    ]
                    try:
                        parts.append(vmap(lambda p, b, batch=batch: one(p, b, batch), randomness="different")(*state))
                    except RuntimeError as error:
                        raise vmap_problem(error, "take the members by .models() and run them one by one") from error
                extra = {k: torch.cat([p[1][k] for p in parts]) for k in parts[0][1]}
                yield batch, Output(torch.cat([p[0] for p in parts]), extra)

    def predict(self, split: Split, batch_size: int = 512) -> Tensor:
        """(M, N, ...) predictions (logits, values) of every model on every row of the split, in its order."""
        found = [output.prediction for _, output in self.outputs(split, batch_size)]
        if not found:
            raise BadData(f"expected rows in the split '{split.name}', found none; predict on a non-empty split")
        return torch.cat(found, dim=1)

    def signals(self, split: Split, name: str = "margin", batch_size: int = 512) -> Tensor:
        """(M, N) a membership signal of the task; higher means more likely a member."""
        columns = []
        for batch, output in self.outputs(split, batch_size):
            rows = []
            for i in range(len(self)):
                found = self.task.signals(
                    Output(output.prediction[i], {k: v[i] for k, v in output.extra.items()}), batch
                )
                if name not in found:
                    raise BadSetting(
                        f"expected a signal of {self.task.name}, one of {', '.join(found)}, found '{name}'."
                        f"{nearest(name, found)} Use one of them"
                    )
                rows.append(found[name])
            columns.append(torch.stack(rows))
        return torch.cat(columns, dim=1) if columns else torch.zeros(len(self), 0)


class _Forward(nn.Module):
    """A `LossModule` asked for its output only (a split to predict on may have no labels)."""

    def __init__(self, inner: LossModule):
        super().__init__()
        self.inner = inner

    def forward(self, batch: Batch) -> Output:
        return self.inner.task.forward(self.inner.model, batch)


# -- checks and set-up -------------------------------------------------------------------------------------------------
def fresh_model(build: Build, seed: int) -> nn.Module:
    """A model from either kind of factory; global random state is left as it was."""
    wants_seed = any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in inspect.signature(build).parameters.values()
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "fresh"))
        return build(seed) if wants_seed else build()  # type: ignore[call-arg]


def stacked(models: Sequence[nn.Module]) -> tuple[State, State]:
    """Parameters and buffers of all models as (M, *shape) copies without gradient."""
    parameters = [dict(m.named_parameters()) for m in models]
    buffers = [dict(m.named_buffers()) for m in models]
    for kind in (parameters, buffers):
        for i, state in enumerate(kind):
            if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in kind[0].items()}:
                raise BadSetting(
                    f"expected models of one architecture, found that model {i} has other names or shapes than "
                    "model 0; use a factory that builds the same architecture for every seed"
                )
    return tuple({k: torch.stack([s[k].detach() for s in kind]) for k in kind[0]} for kind in (parameters, buffers))  # type: ignore[return-value]


def grouped(sizes: list[int], chunk: int | None, equal_sizes: bool) -> list[list[int]]:
    """Members trained together: sorted by size (little padding), at most `chunk`, of one size if `equal_sizes`."""
    groups: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        full = not groups or len(groups[-1]) == chunk or (equal_sizes and sizes[groups[-1][0]] != sizes[i])
        if full:
            groups.append([])
        groups[-1].append(i)
    return groups


def member_rows(members: Sequence[Tensor] | Tensor, n: int) -> list[Tensor]:
    """Row numbers per model, from a boolean (M, n) mask or a sequence of row numbers."""
    if isinstance(members, Tensor) and members.dtype == torch.bool:
        if members.dim() != 2 or members.shape[1] != n:
            raise BadData(
                f"expected a mask of shape (models, {n}), found {tuple(members.shape)}; one column per row of the data"
            )
        rows = [mask.nonzero().squeeze(1).cpu() for mask in members]
    else:
        rows = [torch.as_tensor(r, dtype=torch.int64).cpu() for r in members]
    for i, own in enumerate(rows):
        if len(own) == 0:
            raise BadData(
                f"expected every member to have rows to train on, found none for member {i}; give it rows or drop it"
            )
        if int(own.min()) < 0 or int(own.max()) >= n:
            raise BadData(
                f"expected row numbers in 0..{n - 1}, found {int(own.min())}..{int(own.max())} for member {i}; "
                "correct the rows"
            )
    return rows


def check_training(rows: list[Tensor], training: Training, seeds: list[int], chunk: int | None) -> None:
    if not rows or len(rows) != len(seeds):
        raise BadSetting(
            f"expected one seed per member, found {len(rows)} members and {len(seeds)} seeds; pass equally many"
        )
    if chunk is not None and chunk < 1:
        raise BadSetting(
            f"expected chunk to be at least 1 model or None for all, found {chunk}; pass a positive number"
        )
    objective = training.objective
    if objective is not None and type(objective).__name__ != "Fit":
        raise BadSetting(
            f"expected a recipe that minimises the task's loss, found the objective {objective}; train such models one "
            "by one with engine.fit and stack them with Ensemble.from_models"
        )
