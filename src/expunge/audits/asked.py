"""What a user asks of an audit: checks and attacks by name, each with settings of its own.

    checks=["rouge", {"name": "lm_eval", "tasks": ["arc_easy"]}]            exactly these
    checks={"rouge": {}, "lm_eval": {"tasks": ["arc_easy"]}}                the same
    checks=["default", {"name": "relearning_curve", "budget": {"steps": 20}}]   and what runs by default
    attacks=["pruning_20", {"name": "relearning", "share": 0.2, "budget": {"steps": 20}}]

A budget may be given in part: the rest is the audit's. Everything that is wrong is told in one error, before any compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from expunge.audits.attacks.budget import Attack, Budget
from expunge.audits.base import Check, find_check
from expunge.audits.battery import default_attacks, find_attacks
from expunge.errors import BadSetting, nearest

DEFAULT = "default"
Spec = str | Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """checks: names in order, None for the default ones; `default` among them stands for these. settings: check -> its own.
    attacks: as `find_attacks` gives them. budget: of all attacks, with those that spend otherwise in it."""

    checks: list[str] | None
    settings: dict[str, dict[str, Any]]
    attacks: list[Attack]
    budget: Budget

    def wanted(self, usual: Iterable[str]) -> list[str]:
        """The checks to run, where `usual` are those that run by default; each once."""
        named = [DEFAULT] if self.checks is None else self.checks
        usual = list(usual)
        return list(dict.fromkeys(name for item in named for name in (usual if item == DEFAULT else [item])))


def asked(
    checks: Iterable[Spec | Check] | Mapping[str, Mapping[str, Any] | None] | None = None,
    attacks: bool | Iterable[Spec | Attack] | None = None,
    budget: Budget | Mapping[str, Any] | None = None,
    kind: str = "",
) -> Asked:
    """Names and settings as an audit uses them; one `BadSetting` with all problems. kind: of task, which has its own battery."""
    problems: list[str] = []

    def attempt(make: Callable[[], T], otherwise: T) -> T:
        try:
            return make()
        except BadSetting as error:
            problems.append(str(error))
            return otherwise

    whole = attempt(lambda: spent(budget, Budget()), Budget())
    names, settings = None if checks is None else [], {}
    for name, given in _pairs(checks, problems):
        assert names is not None
        names.append(name)
        if name == DEFAULT:
            continue
        item = attempt(lambda name=name: find_check(name), None)
        if item is None:
            continue
        attempt(lambda item=item, given=given: item.verify_settings(given), None)
        if "budget" in given:
            given["budget"] = attempt(lambda given=given: spent(given["budget"], whole), whole)
        if given:
            settings[name] = given
    if isinstance(attacks, bool):
        attacks = None if attacks else ()
    found, own = [], []
    for which in default_attacks(kind) if attacks is None else attacks:
        attack, given = _attack(which, kind, attempt, problems)
        if attack is not None:
            found.append(attack)
            if given is not None:
                own.append((attack.name, attempt(lambda given=given: spent(given, whole), whole)))
    attempt(lambda: find_attacks(found, kind), [])
    if problems:
        raise BadSetting(problems[0] if len(problems) == 1 else "the audit cannot start:\n- " + "\n- ".join(problems))
    return Asked(names, settings, found, replace(whole, own=(*whole.own, *own)) if own else whole)


def spent(given: Budget | Mapping[str, Any] | None, whole: Budget) -> Budget:
    """A budget, or the fields in which one differs from `whole`."""
    if given is None or isinstance(given, Budget):
        return given or whole
    known = [field.name for field in fields(Budget) if field.name != "own"]
    if not isinstance(given, Mapping):
        raise BadSetting(
            f"expected a budget as a mapping of {', '.join(known)}, found {given!r}; write budget: {{steps: 10}}"
        )
    _known(given, known, "a budget")
    return replace(whole, **given, own=())


def _attack(
    which: Spec | Attack, kind: str, attempt: Callable[..., Any], problems: list[str]
) -> tuple[Attack | None, Any]:
    """An attack with its fields changed, and its own budget where it has one."""
    if not isinstance(which, Mapping):
        return next(iter(attempt(lambda: find_attacks([which], kind), [])), None), None
    for name, given in _pairs([which], problems):
        attack = next(iter(attempt(lambda name=name: find_attacks([name], kind), [])), None)
        if attack is not None:
            own = given.pop("budget", None)
            known = [field.name for field in fields(attack)]
            attempt(lambda: _known(given, [*known, "budget"], f"the attack '{name}'"), None)
            kept = {key: value for key, value in given.items() if key in known}
            return attempt(lambda attack=attack, kept=kept: replace(attack, **kept), attack), own
    return None, None


def _pairs(specs: Any, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings) of each; a mapping without a name, or with a name and no name's value, is a problem."""
    if specs is None:
        return []
    if isinstance(specs, Mapping):
        specs = [{"name": name, **(given or {})} for name, given in specs.items()]
    found = []
    for item in [specs] if isinstance(specs, (str, Check)) else specs:
        given = dict(item) if isinstance(item, Mapping) else {"name": item.name if isinstance(item, Check) else item}
        name = given.pop("name", None)
        if isinstance(name, str):
            found.append((name, given))
        else:
            problems.append(
                f"expected a name or a mapping with one, found {item!r}; write {{name: lm_eval, tasks: [arc_easy]}}"
            )
    return found


def _known(given: Mapping[str, Any], known: Iterable[str], owner: str) -> None:
    known = list(known)
    strange = [name for name in given if name not in known]
    if strange:
        raise BadSetting(
            f"expected settings of {owner} ({', '.join(known)}), found '{strange[0]}'.{nearest(strange[0], known)} "
            "Remove or rename it."
        )
