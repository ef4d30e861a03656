"""The grammar of methods: terms, plans, edits. All of it is data, and a plan prints itself as a formula.

    Plan(
        Term(relabel(), on="forget"), Term(fit(), on="retain"),
        scope=salient(0.5), optimizer=Optimizer("sgd", lr=0.01), epochs=10, rhythm="in_turn",
    )
    # min  relabel[forget] ; fit[retain]   over salient(0.5)   by sgd(lr=0.01)   for 10 epochs

Rhythm, i.e. how the terms of one epoch become updates:

* `together`: each step draws one batch per split and makes one update of all terms; the epoch is one pass of the
  `epoch_of` split (default: the longest; shorter ones are reshuffled and go round);
* `in_turn`: each split is passed in full, one after the other, in the order of the terms (SalUn, SCRUB);
* `mixed`: all splits are concatenated, shuffled and passed once; each row feeds the terms of its own split, and each
  term is weighted by its rows' share of the batch (Blindspot, Gaussian-Amnesiac, bad teacher).

Terms that carry an optimizer of their own make an update of their own within each step (LAF's two Adams, players).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from expunge.errors import BadSetting
from expunge.parts.schedules import Weight, as_weight

if TYPE_CHECKING:
    from expunge.parts.adversaries import Adversary
    from expunge.parts.balances import Balance
    from expunge.parts.objectives.base import Objective
    from expunge.parts.proximal import Proximal
    from expunge.parts.rewind import Rewind
    from expunge.parts.scopes.base import Scope
    from expunge.parts.stops import Stop

OPTIMIZERS = ("sgd", "adam", "adamw", "adamw_8bit")
SCHEDULES = ("constant", "cosine", "linear", "steps")
RHYTHMS = ("together", "in_turn", "mixed")


@dataclass(frozen=True)
class Optimizer:
    """How weights move.

    name: adamw_8bit is adamw with its state in 8 bits (bitsandbytes, on CUDA only).
    lr: per step. momentum: sgd only. betas: of the adams. weight_decay: coupled (L2) for sgd and adam, decoupled for adamw.
    clip: largest norm of the whole gradient, None for no clipping. clip_value: largest size of any of its elements.
    schedule: `constant`, `cosine` and `linear` (both to zero over all steps), `steps` (x `decay` after each epoch of
    `milestones`). warmup: share of all steps with linearly rising lr.
    """

    name: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    schedule: str = "constant"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    warmup: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_value: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.name not in OPTIMIZERS:
            raise BadSetting(
                f"expected an optimizer, one of {', '.join(OPTIMIZERS)}, found {self.name!r}; use one of them"
            )
        if self.schedule not in SCHEDULES:
            raise BadSetting(
                f"expected a schedule, one of {', '.join(SCHEDULES)}, found {self.schedule!r}; use one of them"
            )
        if not self.lr >= 0:
            raise BadSetting(f"expected lr >= 0, found {self.lr}; use a positive step size")

    def __str__(self) -> str:
        parts = [f"lr={self.lr:g}"]
        parts += [f"momentum={self.momentum:g}"] if self.momentum else []
        parts += [f"wd={self.weight_decay:g}"] if self.weight_decay else []
        parts += [f"betas={self.betas[0]:g},{self.betas[1]:g}"] if self.betas != (0.9, 0.999) else []
        parts += [self.schedule] if self.schedule != "constant" else []
        return f"{self.name}({', '.join(parts)})"


@dataclass(frozen=True)
class Term:
    """An objective on a split with a weight: a number, a schedule of the epoch, or a Lagrange multiplier.

    batch_size: overrides the plan's for this term's split. optimizer: an update of its own within each step.
    every: above 1, the term makes an update of its own at every so many updates, by the optimizer that it would have had
        (lazy regularisation, Karras et al., 1912.04958; the weight is not multiplied by `every` for it).
    """

    objective: Objective
    on: str = "forget"
    weight: float | Weight = 1.0
    _: KW_ONLY
    batch_size: int | None = None
    optimizer: Optimizer | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise BadSetting(f"expected every >= 1 (updates from one to the next), found {self.every}; correct it")

    @property
    def schedule(self) -> Weight:
        return as_weight(self.weight)

    def __str__(self) -> str:
        weight = "" if self.weight == 1.0 else f"{self.schedule}·"
        return f"{weight}{self.objective}[{self.on}]" + (f"@{self.every}" if self.every > 1 else "")


@dataclass(frozen=True)
class Auxiliary:
    """A second network of the method's own (proxy teacher, density model, discriminator).

    build(case, seed) -> nn.Module. Frozen and available as a reference once its phase has ended.
    """

    name: str
    build: Callable[[Any, int], nn.Module]


@dataclass(frozen=True, init=False)
class Plan:
    """A tuned method: what to minimise, where, how, how long. See the module's text for `rhythm`.

    trains: the network under training, "model" or an `Auxiliary`. mode: "train" or "eval" (batch norm and dropout off).
    pool: rows per epoch of a split, e.g. {"retain": 0.3} (a share) or {"retain": 500} (a count), drawn once per phase.
    proximal: a step that follows each update (soft thresholding towards the start). rewind: which epoch's weights come out.
    phases: plans run in order on the same model instead of terms of one's own.
    needs: what the case must have (see methods.registry.NEEDS).
    """

    terms: tuple[Term, ...] = ()
    scope: Scope | None = None
    balance: Balance | None = None
    adversary: Adversary | tuple[Adversary, ...] | None = None
    stop: Stop | None = None
    optimizer: Optimizer = Optimizer()
    epochs: int = 1
    batch_size: int = 64
    rhythm: Literal["together", "in_turn", "mixed"] = "together"
    epoch_of: str | None = None
    mode: Literal["train", "eval"] = "train"
    trains: str | Auxiliary = "model"
    pool: tuple[tuple[str, float], ...] = ()
    average: Any = None
    proximal: Proximal | None = None
    rewind: Rewind | None = None
    phases: tuple[Plan, ...] = ()
    name: str = ""

    def __init__(self, *terms: Term, **settings: Any):
        flat: list[Term] = []
        for term in settings.pop("terms", ()) or terms:
            flat.append(term)
        known = set(self.__dataclass_fields__)
        unknown = set(settings) - known
        if unknown:
            raise BadSetting(
                f"expected settings of a plan among {sorted(known)}, found {sorted(unknown)}; correct the name"
            )
        for key in known:
            object.__setattr__(self, key, settings.get(key, self.__dataclass_fields__[key].default))
        object.__setattr__(self, "terms", tuple(flat))
        object.__setattr__(self, "phases", tuple(self.phases))
        pool = self.pool.items() if isinstance(self.pool, dict) else self.pool
        object.__setattr__(self, "pool", tuple(sorted(pool)))
        if self.rhythm not in RHYTHMS:
            raise BadSetting(f"expected a rhythm, one of {', '.join(RHYTHMS)}, found {self.rhythm!r}; use one of them")
        if self.terms and self.phases:
            raise BadSetting("expected terms or phases in a plan, found both; put the terms into a phase of their own")

    def with_(self, **changes: Any) -> Plan:
        """The same plan with some settings replaced; with phases, the change goes to every phase that trains the model."""
        if self.phases and "phases" not in changes:
            phases = tuple(p.with_(**changes) if p.trains == "model" else p for p in self.phases)
            return replace_plan(self, phases=phases)
        return replace_plan(self, **changes)

    @property
    def splits(self) -> list[str]:
        """Splits the terms read, in order of first appearance."""
        return list(dict.fromkeys(term.on for term in self.terms))

    @property
    def formula(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if self.phases:
            return "  then  ".join(str(p) for p in self.phases)
        joint = {"together": " + ", "in_turn": " ; ", "mixed": " ⊎ "}[self.rhythm]
        who = "" if self.trains == "model" else f"{getattr(self.trains, 'name', self.trains)}: "
        text = f"{who}min {joint.join(map(str, self.terms)) or '0'}"
        text += f" over {self.scope}" if self.scope is not None else ""
        text += f" balanced by {self.balance}" if self.balance is not None else ""
        adversaries = (
            self.adversary if isinstance(self.adversary, tuple) else (self.adversary,) if self.adversary else ()
        )
        text += "".join(f" against {a}" for a in adversaries)
        text += f" with {self.proximal}" if self.proximal is not None else ""
        text += f" by {self.optimizer} for {self.epochs} epoch{'s' if self.epochs != 1 else ''}"
        text += f" until {self.stop}" if self.stop is not None else ""
        text += f", {self.rewind}" if self.rewind is not None else ""
        text += f", {self.average}" if self.average is not None else ""
        return text


def replace_plan(plan: Plan, **changes: Any) -> Plan:
    values = {key: getattr(plan, key) for key in plan.__dataclass_fields__}
    values.update(changes)
    terms = values.pop("terms")
    return Plan(*terms, **values)


@dataclass(frozen=True)
class Training:
    """A recipe that trains a model of the case's kind from its initialisation: what `retrained` means.

    objective: default is the task's loss. adversary, average: of the plan, such as a GAN's discriminator on whatever split is
    trained on. Equal (recipe, rows, seed) give equal tensors.
    """

    epochs: int = 20
    batch_size: int = 64
    optimizer: Optimizer = Optimizer("sgd", lr=0.1, momentum=0.9)
    objective: Objective | None = None
    schedule: str | None = None
    adversary: Any = None
    average: Any = None

    def __post_init__(self) -> None:
        if self.schedule is not None:
            object.__setattr__(self, "optimizer", replace(self.optimizer, schedule=self.schedule))

    def plan(self, on: str = "retain", **changes: Any) -> Plan:
        """The recipe as a plan on one split."""
        from expunge.parts.objectives.likelihood import fit

        settings: dict[str, Any] = {"optimizer": self.optimizer, "epochs": self.epochs, "batch_size": self.batch_size}
        settings |= {"average": self.average} if self.average is not None else {}
        settings |= {"adversary": self.adversary.on_split(on)} if self.adversary is not None else {}
        settings |= changes
        return Plan(Term(self.objective or fit(), on=on), **settings)

    def describe(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "batch_size": self.batch_size, "optimizer": str(self.optimizer)}


@dataclass(frozen=True)
class Edit:
    """A closed-form or one-shot weight edit. `apply(workbench)` changes `workbench.model` in place."""

    apply: Callable[[Any], None]
    formula: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.formula


@dataclass(frozen=True)
class Guard:
    """An inference-time wrapper: `wrap(workbench) -> nn.Module` around untouched weights.

    train(workbench) -> the plan that trains the networks it is made of (`Auxiliary`), run before `wrap` as any plan is: with
    metrics, and resumed after a kill.
    """

    wrap: Callable[[Any], nn.Module]
    formula: str = ""
    train: Callable[[Any], Plan] | None = None

    def __str__(self) -> str:
        return self.formula


@dataclass(frozen=True)
class Exact:
    """A method whose result equals training without the forget rows, or is bounded against it.

    forget(workbench) -> nn.Module. proof(workbench, model) -> mapping with `kind` ("proved" or "bounded") and the numbers
    behind it (relative difference to a clean retrain, or epsilon, delta, residual and budget).
    """

    forget: Callable[[Any], nn.Module]
    formula: str = ""
    proof: Callable[[Any, nn.Module], dict[str, Any]] | None = None

    def __str__(self) -> str:
        return self.formula


@dataclass(frozen=True)
class Protection:
    """Acts before or during training: `train(workbench) -> nn.Module` that later requests can be served from."""

    train: Callable[[Any], nn.Module]
    formula: str = ""

    def __str__(self) -> str:
        return self.formula


Action = Plan | Edit | Guard | Exact | Protection


def as_plan(terms: Plan | Sequence[Term]) -> Plan:
    return terms if isinstance(terms, Plan) else Plan(*terms)
