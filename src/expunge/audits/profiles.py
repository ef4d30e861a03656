"""Audit profiles: named checklists. One row for each question: original, unlearned, retrained, the result and the budget.

    report = run_profile("open_problems", subjects, budget=Budget(steps=10))
    print(report)                                        # a table
    report.failed                                        # ("C2", "D1", ...)

A row passes, fails, is undecided (its interval straddles the margin), is told (a number without a rule), or was not run, always
with its reason. There is no overall score: the failed ids are the result. Margins are 0.05, or the distance of two retrained
seeds where that is larger. Where several checks speak to one question, the worst decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from expunge.audits.attacks.budget import Budget
from expunge.audits.attacks.excess import MARGIN, excess
from expunge.audits.base import Measurement, checks
from expunge.errors import BadSetting, ExpungeError, nearest

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

RESULTS = ("pass", "fail", "undecided", "told", "not run")


@dataclass(frozen=True)
class Row:
    """One answered question. reason: of a row that was not run, or what was compared. budget: what the attacks spent."""

    id: str
    question: str
    result: str
    reason: str = ""
    original: float | None = None
    unlearned: float | None = None
    retrained: float | None = None
    floor: float | None = None
    measured: str = ""
    budget: str = ""


@dataclass(frozen=True)
class ProfileReport:
    """rows: one for each id, in order. No scalar score: `failed` is the verdict."""

    profile: str
    kind: str
    rows: tuple[Row, ...]

    def __getitem__(self, id: str) -> Row:
        return next(row for row in self.rows if row.id == id)

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(row.id for row in self.rows if row.result == "fail")

    def counts(self) -> dict[str, int]:
        return {result: sum(row.result == result for row in self.rows) for result in RESULTS}

    def as_dict(self) -> dict[str, Any]:
        return {
            "profile": self.profile,
            "kind": self.kind,
            "failed": list(self.failed),
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "" if value is None else f"{value:.3f}"

        lines = [f"{'id':<3} {'original':>9} {'unlearned':>9} {'retrained':>9}  {'result':<9}  question"]
        for row in self.rows:
            values = " ".join(f"{number(v):>9}" for v in (row.original, row.unlearned, row.retrained))
            lines.append(
                f"{row.id:<3} {values}  {row.result:<9}  {row.question}" + (f" ({row.reason})" if row.reason else "")
            )
        return "\n".join([*lines, f"failed: {', '.join(self.failed) or 'none'}"])


# -- rules -------------------------------------------------------------------------------------------------------------
def no_more(m: Measurement, margin: float = MARGIN) -> tuple[str, str]:
    """Nothing above the retrained model's value: paired over items where the check kept them."""
    limit, lists = max(margin, m.floor or 0.0), m.per_example or {}
    if "unlearned" in lists and "retrained" in lists and len(lists["unlearned"]) > 1:
        found = excess(lists["unlearned"], lists["retrained"], limit)
        return found.result, f"{found} over the retrained model, margin {limit:.3f}"
    return _within((m.gap or 0.0), limit, "over")


def like_gold(m: Measurement, margin: float = MARGIN) -> tuple[str, str]:
    return _within(abs(m.gap or 0.0), max(margin, m.floor or 0.0), "from")


def no_less(m: Measurement, margin: float = MARGIN) -> tuple[str, str]:
    return _within(-(m.gap or 0.0), max(margin, m.floor or 0.0), "below")


def _within(value: float, limit: float, word: str) -> tuple[str, str]:
    return ("pass" if value <= limit else "fail"), f"{value:+.3f} {word} the retrained model, margin {limit:.3f}"


Rule = Callable[[Measurement], tuple[str, str]]


@dataclass(frozen=True)
class Question:
    """sources: (check, measurement, settings) whose worst decides; `make`: a row of its own instead. lacking: why a row
    without both is not run. A source's measurement "" and no `splits` are any. gold: whether it takes a retrained model."""

    id: str
    text: str
    sources: tuple[tuple[str, str, Mapping[str, Any]], ...] = ()
    rule: Rule = no_more
    make: Callable[[Subjects, Budget, Mapping[str, Any]], Row | str] | None = None
    lacking: str = ""
    splits: tuple[str, ...] = ()
    gold: bool = True


@dataclass(frozen=True)
class Profile:
    """questions in order. minimal: kind of model -> ids that are run unless others are asked for; kinds not named run all.
    always: ids that cost nothing and are run for every kind."""

    questions: tuple[Question, ...]
    minimal: Mapping[str, tuple[str, ...]]
    always: tuple[str, ...] = ()


def find_profile(name: str) -> Profile:
    """A profile by name."""
    from expunge.audits.generation_profile import GENERATION
    from expunge.audits.open_problems import OPEN_PROBLEMS

    known = {"open_problems": OPEN_PROBLEMS, "generation": GENERATION}
    if name not in known:
        raise BadSetting(
            f"expected a profile, one of {', '.join(known)}, found '{name}'.{nearest(name, known)} Use one of them."
        )
    return known[name]


def run_profile(
    name: str,
    subjects: Subjects,
    budget: Budget = Budget(),  # noqa: B008
    ids: Iterable[str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[Question], None] | None = None,
) -> ProfileReport:
    """A profile's questions on these subjects.

    ids: those to run, default the minimal battery of the kind; rows of all others say so. settings: check -> its settings.
    facts: what no check measures: `group` (a column that groups the kept rows), `guard` (two functions of a text, what a
    filter blocks of inputs and of outputs), `again` and `reruns` (see `audits.reruns`), and `seconds`, `retrain_seconds`,
    `weights` of the run's record.
    """
    profile, kind = find_profile(name), subjects.task.name
    questions = profile.questions
    known = [q.id for q in questions]
    wanted = {*profile.minimal.get(kind, known), *profile.always} if ids is None else set(ids)
    strange = sorted(wanted - set(known))
    if strange:
        raise BadSetting(
            f"expected ids of the profile '{name}' ({', '.join(known)}), found {', '.join(strange)}; correct them"
        )
    rows = []
    for question in questions:
        if question.id not in wanted:
            rows.append(Row(question.id, question.text, "not run", f"outside the minimal battery of {kind}"))
            continue
        if progress is not None:
            progress(question)
        rows.append(_answer(question, subjects, budget, dict(settings or {}), dict(facts or {})))
    return ProfileReport(name, kind, tuple(rows))


def _answer(
    question: Question, subjects: Subjects, budget: Budget, settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> Row:
    blank = Row(question.id, question.text, "not run")
    gold = subjects.unmet("retrained")
    if gold and not question.lacking and question.gold:
        return replace(blank, reason="without a retrained model only 'not worse than the original' could be said")
    if question.make is not None:
        try:
            found = question.make(subjects, budget, facts)
        except ExpungeError as error:
            found = str(error)
        return replace(blank, reason=found) if isinstance(found, str) else replace(found, question=question.text)
    if question.lacking:
        return replace(blank, reason=question.lacking)
    rows, reasons = _measured(question, subjects, budget, settings)
    if not rows:
        return replace(blank, reason="; ".join(reasons) or "no check of it serves this kind of model")
    (result, why), m = worst(rows)
    shown = ", ".join(f"{k}={v}" for k, v in budget.describe().items() if v is not None)
    attack = any(item.check == m.check and checks()[m.check].attack for _, item in rows)
    return replace(
        blank, result=result, reason=why, original=m.original, unlearned=m.unlearned, retrained=m.retrained, floor=m.floor,
        measured=f"{m.check}: {m.name}" if m.name != m.check else m.check,
        budget="; ".join(filter(None, (shown if attack else "", m.note))),
    )  # fmt: skip


def _measured(
    question: Question, subjects: Subjects, budget: Budget, settings: Mapping[str, Any]
) -> tuple[list[tuple[tuple[str, str], Measurement]], list[str]]:
    rows, reasons = [], []
    registered = checks(kind=subjects.task.name)
    for name, wanted, changes in question.sources:
        if name not in registered:
            continue
        item = registered[name]
        spent = replace(budget.of(name), own=(), **changes)
        given = {"budget": spent} if "budget" in item.settings else {}
        lacking = [text for need in item.needs if (text := subjects.unmet(need))]
        if lacking:
            reasons += lacking
            continue
        try:
            own = dict(settings.get(name, {}))
            key = ("profile", name, spent, repr(sorted(own.items())))
            found = subjects.memo(key, lambda item=item, own=given | own: item.function(subjects, **own))
        except ExpungeError as error:
            reasons.append(str(error))
            continue
        rows += [
            (question.rule(m), m)
            for m in found
            if wanted in ("", m.name)
            and (not question.splits or m.split in question.splits)
            and m.unlearned is not None
            and m.retrained is not None
        ]
        if not found:
            reasons.append(f"{name} does not apply to this case")
    return rows, reasons


def worst(rows: Sequence[tuple[tuple[str, str], Measurement]]) -> tuple[tuple[str, str], Measurement]:
    """A failure before an open one before a pass; among equals the one furthest from the retrained model."""
    order = {result: number for number, result in enumerate(("pass", "told", "undecided", "fail"))}
    return max(rows, key=lambda row: (order[row[0][0]], abs(row[1].gap or 0.0)))
