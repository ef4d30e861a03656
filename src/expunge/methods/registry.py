"""The registry of methods: a method is a function of typed settings that returns a Plan, Edit, Guard, Exact or Protection.

    @method(family="tuned", needs=("retain", "labels"), intention="suppression", paper="Fan et al., 2310.12508")
    def salun(density: Annotated[float, setting("share of weights that may move", ge=0, le=1)] = 0.5, ...) -> Plan: ...

Registration stands with the method. What a method declares (needs, kinds of model, intention, mechanism, guarantee, paper) is
checked before any compute and printed by `expunge ls methods`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from expunge.cases.case import Case
from expunge.errors import BadSetting, UnmetNeed, nearest
from expunge.parts.mixture import mixtures
from expunge.parts.plan import Action

FAMILIES = ("exact", "tuned", "edited", "guarded", "protected")
INTENTIONS = ("removal", "suppression", "training", "baseline")
GUARANTEES = ("exact", "certified", "empirical")
ANY_KIND = ("any",)
FIXED_SIZE = ("classification", "regression")
"""Kinds whose examples and answers are all of one size: what methods need that stack activations, or vectorise over examples."""


def setting(description: str, **limits: Any) -> Any:
    """Help and limits of one setting, for `Annotated[float, setting("step size", gt=0)]`."""
    return Field(description=description, **limits)


@dataclass(frozen=True)
class Method:
    """A registered method. `configure(**settings)` checks the settings; `action(case)` gives what the engine carries out."""

    name: str
    function: Callable[..., Action]
    family: str
    needs: tuple[str, ...]
    kinds: tuple[str, ...]
    intention: str
    mechanism: str
    guarantee: str
    paper: str
    contrib: bool = False
    learn: Callable[..., Any] | None = None
    rebuild: Callable[..., Any] | None = None
    prepare: Callable[..., dict[str, Any]] | None = None

    @cached_property
    def settings(self) -> type[BaseModel]:
        """The settings as a pydantic model; unknown names are refused."""
        hints = get_type_hints(self.function, include_extras=True)
        fields: dict[str, Any] = {}
        for name, parameter in inspect.signature(self.function).parameters.items():
            if name == "case":
                continue
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (hints.get(name, Any), default)
        config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
        return create_model(f"{self.name}_settings", __config__=config, **fields)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    def configure(self, **settings: Any) -> Configured:
        """Check the settings: an unknown name suggests the nearest, a bad value says what was expected."""
        known = list(self.settings.model_fields)
        for name in settings:
            if name not in known:
                raise BadSetting(
                    f"expected a setting of {self.name}, one of {', '.join(known) or 'none'}, found '{name}'."
                    f"{nearest(name, known)}"
                )
        try:
            checked = self.settings(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BadSetting(
                f"expected {self.name}.{where}: {first['msg']}; found {first['input']!r}; correct it "
                f"({self.settings.model_fields[str(first['loc'][0])].description or 'see expunge ls methods'})"
            ) from error
        return Configured(self, {k: getattr(checked, k) for k in known})

    def unmet(self, case: Case, values: Mapping[str, Any] | None = None) -> list[str]:
        """Every unmet need, each with its reason and its remedy. values: the settings, of which `answers` says whether refusals
        or a row's own alternatives are read, or neither."""
        found = []
        if self.kinds != ANY_KIND and case.task.name not in self.kinds:
            found.append(
                f"{self.name} serves {', '.join(self.kinds)}, and the case is {case.task.name}; choose a method that serves it "
                "(expunge ls methods)"
            )
        trained_for = getattr(case.model, "expunge_protection", "")
        if "protection" in self.needs and trained_for not in ("", self.name):
            found.append(
                f"{self.name} needs a model trained for it, and this one was trained for {trained_for}; use that method"
            )
        needs, answers = self.needs, (values or {}).get("answers", "refusal")
        if "refusals" in needs and answers != "refusal":
            needs = tuple(n for n in needs if n != "refusals") + (("alternates",) if answers == "alternates" else ())
        for need in needs:
            check, why = NEEDS[need]
            if not check(case):
                found.append(f"{self.name} needs {why}")
        return found


@dataclass(frozen=True)
class Configured:
    """A method with its settings: what `unlearn` takes."""

    method: Method
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.method.name

    def action(self, case: Case) -> Action:
        takes_case = "case" in inspect.signature(self.method.function).parameters
        return self.method.function(**({"case": case} if takes_case else {}), **self.values)

    def unmet(self, case: Case) -> list[str]:
        """Every need of the method with these settings that the case does not meet."""
        return self.method.unmet(case, self.values)

    def check(self, case: Case) -> None:
        """Raise one `UnmetNeed` with everything that is missing."""
        missing = self.unmet(case)
        if missing:
            raise UnmetNeed(
                f"expected the case to have what {self.name} needs, found {len(missing)} unmet: " + "; ".join(missing)
            )


def _writes(case: Case) -> bool:
    """Whether the model can be asked in text."""
    return getattr(case.data, "tokenizer", None) is not None and hasattr(case.model, "generate")


NEEDS: dict[str, tuple[Callable[[Case], bool], str]] = {
    "retain": (lambda c: len(c.split("retain")) > 0, "retain data; keep some training data in the case"),
    "labels": (
        lambda c: c.task.labelled(c.data.names),
        "labels; give the data a labels column, or choose a label-free method (laf, lfssd)",
    ),
    "recipe": (lambda c: c.recipe is not None, "the training recipe; pass Case(recipe=Training(...))"),
    "holdout": (
        lambda c: "holdout" in c.splits,
        "unseen data of the forget kind; pass Case(holdout=...) or Case(test=...)",
    ),
    "class_request": (
        lambda c: c.request.describe().get("kind") in ("class", "none"),
        "a request for whole classes; use requests.label(c), or choose a method for samples",
    ),
    "refusals": (
        lambda c: c.task.name != "language" or bool(getattr(c.data, "refusals", ())),
        "answers that decline; pass question_answer(..., refusals=[...])",
    ),
    "alternates": (
        lambda c: c.task.name != "language" or getattr(c.data, "alternates", None) is not None or _writes(c),
        "other answers to each question; pass question_answer(..., alternates=[[...], ...]), or data with its tokenizer and a "
        "model that generates, to write them",
    ),
    "mixture": (
        lambda c: bool(mixtures(c.model)),
        "a mixture-of-experts model (layers with a router and experts), and this one is dense; choose a method for dense "
        "models, such as npo or sha256",
    ),
    "protection": (
        lambda c: bool(getattr(c.model, "expunge_protection", "")),
        "a model trained for it; train one with expunge.protect(case, method), or 'expunge protect CASE.yaml'",
    ),
}
"""What a method may need of a case: the check, and the sentence that names it with its remedy."""

_METHODS: dict[str, Method] = {}


def method(
    *,
    family: str,
    paper: str,
    needs: tuple[str, ...] = (),
    kinds: tuple[str, ...] = ANY_KIND,
    intention: str = "suppression",
    mechanism: str = "",
    guarantee: str = "empirical",
    contrib: bool = False,
    learn: Callable[..., Any] | None = None,
    rebuild: Callable[..., Any] | None = None,
    prepare: Callable[..., dict[str, Any]] | None = None,
) -> Callable[[Callable[..., Action]], Callable[..., Action]]:
    """Register a function of settings as a method under its own name. learn: for methods that act at training time, a
    function (case, seed, **settings) -> trained nn.Module, reached by `expunge.protect`; rebuild: (base, **structure) ->
    the same model with empty tensors, for `stored.load_protected`; prepare: (case, seed, device, report, **settings) -> what a trained
    model's training rows tell before any request, reached by `expunge.prepare`."""
    declared = (
        (family, FAMILIES, "family"),
        (intention, INTENTIONS, "intention"),
        (guarantee, GUARANTEES, "guarantee"),
    )
    for value, known, what in declared:
        if value not in known:
            raise BadSetting(f"expected a {what}, one of {', '.join(known)}, found {value!r}; use one of them")
    for need in needs:
        if need not in NEEDS:
            raise BadSetting(f"expected a need, one of {', '.join(NEEDS)}, found {need!r}.{nearest(need, NEEDS)}")

    def register(function: Callable[..., Action]) -> Callable[..., Action]:
        name = function.__name__
        if name in _METHODS and _METHODS[name].function.__module__ != function.__module__:
            raise BadSetting(f"expected a new method name, found '{name}' already registered; rename the function")
        _METHODS[name] = Method(
            name,
            function,
            family,
            needs,
            kinds,
            intention,
            mechanism or family,
            guarantee,
            paper,
            contrib,
            learn,
            rebuild,
            prepare,
        )
        return function

    return register


def load_all() -> None:
    """Import every file of methods/<family>/, so that each registers itself."""
    for family in FAMILIES:
        package = importlib.import_module(f"expunge.methods.{family}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"expunge.methods.{family}.{module.name}")


def methods(family: str | None = None, kind: str | None = None) -> dict[str, Method]:
    """All registered methods by name, of one family or for one kind of model if asked."""
    load_all()
    return {
        name: m
        for name, m in sorted(_METHODS.items())
        if (family is None or m.family == family) and (kind is None or m.kinds == ANY_KIND or kind in m.kinds)
    }


def find(name: str) -> Method:
    """One method; an unknown name suggests the nearest."""
    known = methods()
    if name not in known:
        raise BadSetting(f"expected a method, found '{name}'.{nearest(name, known)} See: expunge ls methods")
    return known[name]
