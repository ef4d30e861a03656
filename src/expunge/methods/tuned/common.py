"""What the tuned methods share: settings (type, help and limits in one place; defaults stand with each method), and the loop
of language unlearning, which `@finetuning` puts around a method's terms."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

from expunge.cases.case import Case
from expunge.errors import BadSetting, UnmetNeed
from expunge.methods.registry import setting
from expunge.parts.objectives import fit, match
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.stops import steps

Lr = Annotated[float, setting("step size", gt=0)]
Epochs = Annotated[int, setting("passes over the data of the terms", ge=1)]
BatchSize = Annotated[int, setting("rows per step", ge=1)]
Momentum = Annotated[float, setting("of SGD", ge=0, lt=1)]
WeightDecay = Annotated[float, setting("L2 weight decay, coupled; decoupled with adamw", ge=0)]
Clip = Annotated[float | None, setting("largest norm of the whole gradient; none: no clipping", gt=0)]
OptimizerName = Annotated[Literal["sgd", "adam", "adamw"], setting("how weights move")]
Schedule = Annotated[Literal["constant", "cosine", "linear"], setting("of the step size after its warm-up")]
Warmup = Annotated[float, setting("epochs in which the step size rises", ge=0)]
Average = Annotated[
    Literal["examples", "tokens"], setting("a mean over a batch counts every example alike, or every answer token")
]
Gamma = Annotated[float, setting("weight of the forget loss", gt=0)]
Alpha = Annotated[float, setting("weight of the retain loss; 0: no retain data is read", ge=0)]


def loop(
    lr: Lr = 1e-5, epochs: Epochs = 10, batch_size: BatchSize = 32, optimizer: OptimizerName = "adamw",
    weight_decay: WeightDecay = 0.01, schedule: Schedule = "linear", warmup: Warmup = 1.0, clip: Clip = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """The plan's settings of nearly every language method: each step takes one batch of forget rows and as many retain rows,
    an epoch is one pass of the forget rows. Defaults are those of open-unlearning's TOFU runs (2506.12618)."""
    move = Optimizer(
        optimizer, lr=lr, weight_decay=weight_decay, clip=clip, schedule=schedule, warmup=min(warmup / epochs, 1.0)
    )
    return {"optimizer": move, "epochs": epochs, "batch_size": batch_size, "rhythm": "together", "epoch_of": "forget"}


def finetuning(**defaults: Any) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Put the loop around a method: its function gives the terms (a Plan), and gets the settings of `loop` beside its own.

    defaults: of those settings, where the method's differ."""
    around = [
        p.replace(kind=p.KEYWORD_ONLY, default=defaults.get(p.name, p.default))
        for p in inspect.signature(loop, eval_str=True).parameters.values()
    ]
    names = [p.name for p in around]

    def wrap(function: Callable[..., Plan]) -> Callable[..., Plan]:
        own = inspect.signature(function)

        @functools.wraps(function)
        def whole(*args: Any, **settings: Any) -> Plan:
            moving = {p.name: settings.pop(p.name, p.default) for p in around}
            return function(*args, **settings).with_(**loop(**moving))

        whole.__signature__ = own.replace(parameters=[*own.parameters.values(), *around])  # type: ignore[attr-defined]
        whole.__annotations__ = function.__annotations__ | {p.name: p.annotation for p in around}
        return whole

    if unknown := set(defaults) - set(names):
        raise BadSetting(
            f"expected settings of the loop, among {', '.join(names)}, found {', '.join(unknown)}; correct them"
        )
    return wrap


Steps = Annotated[int, setting("updates of the weights", ge=1)]


def counted(case: Case, count: int, batch_size: int, split: str = "forget") -> dict[str, Any]:
    """The plan's settings of a method whose paper counts updates: passes of a split until there were `count` of them."""
    per_epoch = max(1, -(-len(case.split(split)) // batch_size))
    return {
        "epochs": -(-count // per_epoch), "batch_size": batch_size, "stop": steps(count), "rhythm": "together",
        "epoch_of": split,
    }  # fmt: skip


ANCHOR_SCOPES = {"kv": "cross_attention_kv", "attention": "attention", "all": "network"}
AnchorScope = Annotated[Literal["kv", "attention", "all"], setting("which weights of the network move")]
Target = Annotated[str, setting("the target's words, or class")]
Anchor = Annotated[str, setting("words, or class, of what is drawn instead")]
AnchorImages = Annotated[int, setting("anchor images that the original draws", ge=1)]


def there_and_back(case: Case, concept: str, anchor: str) -> tuple[str, str]:
    """Rules from the target's condition to the anchor's, and from the anchor's to the target's (of synonyms, the first)."""
    if getattr(case.model, "kind", "class") == "class":
        return anchor, concept
    return f"{concept} -> {anchor}", f"{anchor} -> {concept.split('|')[0].strip()}"


def kept_classes(case: Case) -> list[int]:
    """The class ids of a generative model that the request leaves: what a forgotten class may be answered as."""
    if case.model.kind == "text":
        raise UnmetNeed(
            "expected the condition that stands in for the forgotten one, found 'another', which serves classes; say it in words: "
            "'red -> plain', or a prompt"
        )
    asked = {int(c) for batch in case.split("forget").batches(4096) for c in case.task.condition(batch).unique()}
    return [c for c in range(case.model.conditions.count) if c not in asked]


def stay(alpha: float, average: str = "tokens", by: str = "nll") -> tuple[Term, ...]:
    """The retain term that nearly every language method has beside its forget term; none where alpha is 0."""
    objective = fit(average) if by == "nll" else match("original")
    return (Term(objective, on="retain", weight=alpha),) if alpha else ()
