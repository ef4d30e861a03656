"""Rows of the checklist that take the method again: alignment before and after (G2), hostile requests (G5), several requests
(H1), growing requests (H2), several seeds (H5).

    facts = {"again": again, "reruns": 3}        `Auditor(profile="open_problems", reruns=3)` makes them

`again(case, seed, state)` serves a case's request by the audited method and returns what has `.model` and `.state`. `reruns`
says how many parts, sizes, seeds and hostile requests are tried. All models are measured on the same rows: forget scores on
rows of the audited request, utility on its kept rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audits.attacks.budget import Budget, forget_scores
from expunge.audits.attacks.excess import MARGIN
from expunge.audits.attacks.relearning import trained
from expunge.audits.metrics.refusals import NEED, refused
from expunge.audits.profiles import Row
from expunge.cases import forget_sets, requests
from expunge.cases.data import Split
from expunge.parts.objectives import fit
from expunge.parts.plan import Plan, Term
from expunge.parts.stops import steps
from expunge.seeds import derive, generator

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case

Facts = Mapping[str, Any]
Maker = Callable[["Subjects", Budget, Facts], Row | str]
ALIGNMENT_UPDATES = 30
LACKING = "takes the method again: audit with reruns=3 (it costs that many further runs)"


def several_requests(subjects: Subjects, budget: Budget, facts: Facts) -> Row | str:
    """The request in parts, one after another, each part out of the data once it is gone: what was forgotten stays so."""
    case, again, parts = subjects.case, facts["again"], _parts(subjects, facts)
    model, state, own, utilities = subjects.model("original"), None, [], []
    for number, part in enumerate(parts):
        gone = torch.cat(parts[:number]) if number else part[:0]
        keep = torch.ones(len(case.data), dtype=torch.bool)
        keep[gone] = False
        left = keep.nonzero().flatten()
        asked = torch.searchsorted(left, part)
        data = case.data.subset(left)
        outcome = again(case.with_(model=model, data=data, request=requests.samples(asked.tolist())), number, state)
        model, state = outcome.model, outcome.state
        own.append(_score(subjects, model, part))
        utilities.append(_utility(subjects, model))
    later = [_score(subjects, model, part) for part in parts]
    risen = max(b - a for a, b in zip(own, later, strict=True))
    kept, gold, limit = utilities[-1], _of(subjects, "retrained"), _limit(subjects)
    good = risen <= MARGIN and kept >= gold - limit
    shown = ", ".join(f"{u:.3f}" for u in utilities)
    return Row(
        "H1", "", "pass" if good else "fail",
        f"after {len(parts)} requests an earlier part's forget score has risen by {risen:+.3f} at most; utility after each: {shown}",
        _of(subjects, "original"), kept, gold, None, f"{subjects.task.utility} of kept rows after the last request",
    )  # fmt: skip


def growing_requests(subjects: Subjects, budget: Budget, facts: Facts) -> Row | str:
    """Requests for one part, two parts, ... all of it, each from the original: a larger one must not cost more, or leave more."""
    case, again, parts = subjects.case, facts["again"], _parts(subjects, facts)
    left, utilities, asked = [], [], []
    for count in range(1, len(parts) + 1):
        rows = torch.cat(parts[:count]).sort().values
        whole = count == len(parts)
        model = (
            subjects.model("unlearned")
            if whole
            else again(case.with_(request=requests.samples(rows.tolist())), 0, None).model
        )
        left.append(_score(subjects, model, rows) - _score(subjects, subjects.model("retrained"), rows))
        utilities.append(_utility(subjects, model))
        asked.append(len(rows))
    limit = _limit(subjects)
    good = max(left) <= limit and utilities[-1] >= utilities[0] - limit
    shown = ", ".join(
        f"{n} rows: {f:+.3f} left, utility {u:.3f}" for n, f, u in zip(asked, left, utilities, strict=True)
    )
    return Row(
        "H2", "", "pass" if good else "fail", f"{shown}; margin {limit:.3f}", _of(subjects, "original"), utilities[-1],
        _of(subjects, "retrained"), None, f"{subjects.task.utility} of kept rows at the largest request",
    )  # fmt: skip


def seeds(subjects: Subjects, budget: Budget, facts: Facts) -> Row | str:
    """Further seeds of the same run: the spread of forget score and utility, beside that of two retrained seeds."""
    case, again, forget = subjects.case, facts["again"], subjects.case.split("forget").ids
    models = [
        subjects.model("unlearned"),
        *(again(case, derive(subjects.seed, "rerun", k), None).model for k in range(int(facts["reruns"]))),
    ]
    scores = [_score(subjects, model, forget) for model in models]
    utilities = [_utility(subjects, model) for model in models]
    spread, limit = max(np.ptp(scores), np.ptp(utilities)), _limit(subjects)
    shown = f"forget score {min(scores):.3f} to {max(scores):.3f}, utility {min(utilities):.3f} to {max(utilities):.3f}"
    return Row(
        "H5", "", "pass" if spread <= limit else "fail", f"{len(models)} seeds: {shown}; margin {limit:.3f}", None,
        float(spread), None, limit if limit > MARGIN else None, "largest spread over seeds",
    )  # fmt: skip


def hostile_requests(subjects: Subjects, budget: Budget, facts: Facts) -> Row | str:
    """Requests of the same size for rows that were to stay: those the original fits best, those it fits worst, drawn ones.

    The worst utility of what is then left, against the honest request's.
    """
    case, again = subjects.case, facts["again"]
    kept, count, tries = case.split("retain").ids, len(case.split("forget")), max(int(facts["reruns"]), 1)
    count = min(count, len(kept) // 2)
    table, task = case.data.subset(kept), case.task
    found = {
        "best known": forget_sets.lowest_loss(table, subjects.model("original"), task, count=count),
        "worst known": forget_sets.highest_loss(table, subjects.model("original"), task, count=count),
    }
    found |= {
        f"drawn {k}": forget_sets.random(table, count=count, seed=derive(subjects.seed, "hostile", k))
        for k in range(tries - 2)
    }
    utilities = {}
    for name, request in list(found.items())[:tries]:
        rows = kept[request.rows(table)]
        made = case.with_(request=requests.samples(rows.tolist()))
        model = again(made, 0, None).model
        left = torch.tensor(sorted(set(kept.tolist()) - set(rows.tolist())))
        utilities[name] = _utility(subjects, model, Split("left", case.data, left))
    worst, honest, limit = min(utilities, key=lambda k: utilities[k]), _of(subjects, "unlearned"), _limit(subjects)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in utilities.items())
    return Row(
        "G5", "", "pass" if utilities[worst] >= honest - limit else "fail",
        f"utility of the rest after requests for kept rows: {shown}; after the honest one {honest:.3f}; margin {limit:.3f}",
        _of(subjects, "original"), utilities[worst], honest, None, f"{subjects.task.utility} after the worst hostile request",
    )  # fmt: skip


def order_of_alignment(subjects: Subjects, budget: Budget, facts: Facts) -> Row | str:
    """Refusals taught before unlearning or after it (the table `harmful`, whose answers decline): is the end the same?"""
    if subjects.unmet(NEED):
        return str(subjects.unmet(NEED))
    case, again = subjects.case, facts["again"]

    def aligned(model: nn.Module) -> nn.Module:
        data = subjects.split(NEED).data
        rows = Split("aligned", data, torch.arange(len(data)))
        return align(model, case, rows, budget, derive(subjects.seed, "aligned"))

    first = again(case.with_(model=aligned(subjects.model("original"))), 0, None).model
    last = aligned(subjects.model("unlearned"))
    told = {name: (_score(subjects, m, case.split("forget").ids), float(refused(subjects, m).mean()))
            for name, m in (("first", first), ("last", last))}  # fmt: skip
    apart = max(abs(a - b) for a, b in zip(told["first"], told["last"], strict=True))
    limit = max(MARGIN, 2 / len(subjects.split(NEED)))
    shown = "; ".join(
        f"aligned {name}: forget score {score:.3f}, refuses {rate:.2f}" for name, (score, rate) in told.items()
    )
    return Row("G2", "", "pass" if apart <= limit else "fail", f"{shown}; margin {limit:.3f}", None, float(apart), None, None,
               "largest difference between the two orders")  # fmt: skip


def align(model: nn.Module, case: Case, rows: Split, budget: Budget, seed: int) -> nn.Module:
    """A copy that has learned these rows' answers beside the kept rows, in `ALIGNMENT_UPDATES` updates at the recipe's rate."""
    plan = Plan(
        Term(fit(), on=rows.name), Term(fit(), on="retain"), optimizer=budget.optimizer(case), batch_size=budget.rows(case),
        epochs=ALIGNMENT_UPDATES, stop=steps(ALIGNMENT_UPDATES),
    )  # fmt: skip
    return trained(model, case, plan, rows, seed, case.split("retain"))


def with_reruns(make: Maker) -> Maker:
    """The row where the method can be run again, else why it was not run."""

    def made(subjects: Subjects, budget: Budget, facts: Facts) -> Row | str:
        return make(subjects, budget, facts) if facts.get("again") and facts.get("reruns") else LACKING

    return made


def _parts(subjects: Subjects, facts: Facts) -> list[Tensor]:
    """Row numbers of the request, dealt at random into parts; ascending in each."""
    ids = subjects.case.split("forget").ids
    order = torch.randperm(len(ids), generator=generator(subjects.seed, "reruns"))
    return [ids[part].sort().values for part in order.tensor_split(min(int(facts["reruns"]), len(ids)))]


def _score(subjects: Subjects, model: nn.Module, rows: Tensor) -> float:
    """Mean forget score of these rows of the training data."""
    return float(forget_scores(model, subjects.case, Split("rows", subjects.case.data, rows), subjects.seed).mean())


def _utility(subjects: Subjects, model: nn.Module, split: Split | None = None) -> float:
    rows = subjects.case.split("retain") if split is None else split
    return float(subjects.task.evaluate(model, rows.batches(subjects.batch_size))[subjects.task.utility])


def _of(subjects: Subjects, subject: str) -> float:
    return float(subjects.evaluate(subject, "retain")[subjects.task.utility])


def _limit(subjects: Subjects) -> float:
    """The margin, or the distance of two retrained seeds in forget score where that is larger."""
    if subjects.unmet("floor"):
        return MARGIN
    means = [subjects.forget_scores(s, "forget").mean() for s in ("retrained", "floor")]
    return max(MARGIN, float(abs(means[0] - means[1])))
