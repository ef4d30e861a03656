"""The checklist's rows on process: the method is a stand-in whose models are known, so that each row's numbers are too."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.toys import PEOPLE, REFUSALS, facts, toy, words_tokenizer

from expunge.audits import Subjects
from expunge.audits.attacks.budget import Budget, forget_scores
from expunge.audits.metrics.refusals import refuses
from expunge.audits.profiles import run_profile
from expunge.audits.reruns import align
from expunge.cases.data import Split, TensorData
from expunge.cases.text import question_answer
from expunge.engine import fit
from expunge.methods.outcome import unlearn
from expunge.records.audit import Auditor


def subjects(kind, unlearned, **probes):
    found = toy(kind)
    case = found.case.with_(probes=found.case.probes | probes) if probes else found.case
    return Subjects(case, found.original, unlearned, found.retrained, resamples=50)


def answering(model, calls=None):
    """A method that always ends in this model; `calls` hears what it was asked."""

    def again(case, seed, state):
        if calls is not None:
            calls.append(case)
        return SimpleNamespace(model=model(len(calls or [])) if callable(model) and not hasattr(model, "parameters") else model,
                               state={"served": (state or {}).get("served", 0) + 1})  # fmt: skip

    return again


def row(id, made, again, reruns=2):
    return run_profile("open_problems", made, Budget(steps=3), (id,), facts={"again": again, "reruns": reruns})[id]


def mean(model, case, rows=None):
    split = case.split("forget") if rows is None else Split("rows", case.data, rows)
    return float(forget_scores(model, case, split).mean())


def digests(case, split):
    return set(case.data.row_digests(case.split(split).ids))


def test_requests_in_a_row_are_the_parts_and_what_is_gone_is_out_of_the_data():
    found, calls = toy("class"), []
    made = subjects("class", found.retrained)
    told = row("H1", made, answering(found.retrained, calls), 3)
    assert told.result == "pass" and "+0.000 at most" in told.reason
    parts = [digests(case, "forget") for case in calls]
    assert set.union(*parts) == digests(found.case, "forget") and sum(map(len, parts)) == len(
        found.case.split("forget")
    )
    for number, case in enumerate(calls):
        gone = set().union(*parts[:number])
        assert not gone & set(case.data.row_digests(range(len(case.data))))
        assert digests(case, "retain") == digests(found.case, "retain") | set().union(*parts[number + 1 :])
    assert calls[0].model is found.original and calls[1].model is found.retrained


def test_what_comes_back_with_a_later_request_fails():
    found, calls = toy("class"), []
    made = subjects("class", found.retrained)
    told = row("H1", made, answering(lambda n: found.retrained if n == 1 else found.original, calls))
    assert told.result == "fail"
    rows = torch.tensor([i for i in found.case.split("forget").ids.tolist()
                         if found.case.data.row_digests([i])[0] in digests(calls[0], "forget")])  # fmt: skip
    risen = mean(found.original, found.case, rows) - mean(found.retrained, found.case, rows)
    assert risen > 0.1 and f"{risen:+.3f} at most" in told.reason


def test_a_larger_request_must_leave_no_more():
    found = toy("class")
    good = row("H2", subjects("class", found.retrained), answering(found.retrained))
    assert good.result == "pass" and good.reason.count("rows: +0.000 left") == 2
    bad = row("H2", subjects("class", found.original), answering(found.retrained))
    left = mean(found.original, found.case) - mean(found.retrained, found.case)
    assert bad.result == "fail" and f"{len(found.case.split('forget'))} rows: {left:+.3f} left" in bad.reason


def test_seeds_are_compared_by_their_spread():
    found = toy("class")
    same = row("H5", subjects("class", found.retrained), answering(found.retrained))
    assert same.result == "pass" and same.unlearned == 0.0 and "3 seeds" in same.reason
    apart = row("H5", subjects("class", found.retrained), answering(found.original))
    assert (
        apart.result == "fail"
        and apart.unlearned >= mean(found.original, found.case) - mean(found.retrained, found.case) - 1e-9
    )


def test_hostile_requests_ask_for_kept_rows_and_the_worst_counts():
    found, calls = toy("class"), []
    made = subjects("class", found.retrained)
    ruined = found.case.fresh(5)
    told = row("G5", made, answering(lambda n: ruined if n == 2 else found.retrained, calls), 3)
    assert len(calls) == 3 and all(not digests(case, "forget") & digests(found.case, "forget") for case in calls)
    losses = [float(made.task.evaluate(found.original, case.split("forget").batches())["loss"]) for case in calls]
    assert losses[0] == min(losses) and losses[1] == max(losses)  # best known, worst known, drawn
    assert told.result == "fail" and told.unlearned < 0.4 < told.retrained
    assert row("G5", made, answering(found.retrained), 3).result == "pass"


def test_without_reruns_the_rows_say_what_they_take():
    found = toy("class")
    report = run_profile("open_problems", subjects("class", found.retrained), Budget(), ("G5", "H1", "H2", "H5", "G2"))
    assert all(
        r.result == "not run" and "reruns=3" in r.reason for r in report.rows if r.id in ("G5", "H1", "H2", "H5", "G2")
    )


def test_the_auditor_runs_its_own_method_again():
    found = toy("class")
    auditor = Auditor(found.case, gold=found.retrained, floor=fit(found.case, "retain", 2), checks=["forget_score"],
                      attacks=False, profile="open_problems", reruns=2)  # fmt: skip
    told = auditor.audit(unlearn(found.case, "fine_tune", epochs=1)).profile["H1"]
    assert told.result in ("pass", "fail") and told.reason.startswith("after 2 requests")


# -- language ----------------------------------------------------------------------------------------------------------
def harmful():
    """Questions that nobody may answer, and their refusals."""
    questions = [f"where does p{p} work ?" for p in range(8)]
    return question_answer(words_tokenizer(), questions, [REFUSALS[i % 2] for i in range(8)], template="{question}")


def monitored(random=False):
    """Questions about people of two kinds, or of kinds drawn for each question."""
    questions, answers, person = facts(range(12))
    kinds = [p % 2 for p in person]
    if random:
        kinds = np.random.default_rng(0).integers(2, size=len(kinds)).tolist()
    return question_answer(words_tokenizer(), questions, answers, template="{question}", kind=kinds)


@cache
def aligned():
    """The original after a few epochs of refusals."""
    found, table = toy("language"), harmful()
    return align(found.original, found.case, Split("aligned", table, torch.arange(len(table))), Budget(), 0)


def test_an_opening_is_a_refusal_and_an_answer_is_none():
    known = {"that is not for me"}
    assert refuses("I’m sorry, but no.", set()) and refuses("That is not for  me to say", known)
    assert not refuses("Sure, the answer is I cannot", known) and not refuses("", known)


def test_lost_refusals_fail_against_the_original():
    found = toy("language")
    case = found.case.with_(probes={"harmful": harmful()})
    made = Subjects(case, aligned(), found.original, found.retrained, resamples=50)
    told = run_profile("open_problems", made, Budget(), ("G1",))["G1"]
    assert told.original == 1.0 and told.unlearned == 0.0 and told.result == "fail" and "+1.000 below" in told.reason
    kept = Subjects(case, aligned(), aligned(), found.retrained, resamples=50)
    assert run_profile("open_problems", kept, Budget(), ("G1",))["G1"].result == "pass"
    lacking = run_profile("open_problems", subjects("language", found.original), Budget(), ("G1", "G3", "G4"))
    assert "harmful" in lacking["G1"].reason and "monitored" in lacking["G3"].reason and "guard" in lacking["G4"].reason


def test_a_method_that_does_nothing_has_no_order_and_one_that_forgets_alignment_has():
    found = toy("language")
    made = subjects("language", found.original, harmful=harmful())
    nothing = row("G2", made, lambda case, seed, state: SimpleNamespace(model=case.model, state=None))
    assert (
        nothing.result == "pass"
        and nothing.unlearned == pytest.approx(0.0, abs=1e-6)
        and "refuses 1.00" in nothing.reason
    )
    other = row("G2", made, answering(found.original))
    assert other.result == "fail" and other.unlearned > 0.9


def test_a_detector_finds_what_is_there_and_not_what_is_drawn():
    found = toy("language")
    told = run_profile("open_problems", subjects("language", found.original, monitored=monitored()), Budget(), ("G3",))[
        "G3"
    ]
    assert told.result == "pass" and told.unlearned > 0.95 and "has 1.000 on the unlearned" in told.reason
    drawn = run_profile(
        "open_problems", subjects("language", found.original, monitored=monitored(True)), Budget(), ("G3",)
    )
    assert drawn["G3"].unlearned < 0.85
    broken = run_profile(
        "open_problems", subjects("language", found.case.fresh(4), monitored=monitored()), Budget(), ("G3",)
    )["G3"]
    assert float(broken.reason.split("has ")[1].split()[0]) < 0.7  # a detector left as it was is lost with its model


def test_a_filter_alone_beside_unlearning_alone_and_both():
    found = toy("language")
    made = subjects("language", found.retrained)

    def told(guard):
        return run_profile("open_problems", made, Budget(), ("G4",), facts={"guard": guard})["G4"]

    shut = told((lambda text: True, lambda text: False))
    assert shut.result == "told" and shut.original == shut.unlearned == 0.0 and "blocked: 1.000" in shut.reason
    open_ = told((lambda text: False, lambda text: False))
    assert open_.original > 0.9 and open_.unlearned == open_.retrained < 0.5 and "blocked: 0.000" in open_.reason


def test_rows_of_a_table_are_a_table():
    table = TensorData(inputs=torch.arange(12.0).reshape(6, 2), labels=torch.arange(6))
    part = table.subset([4, 1])
    assert len(part) == 2 and part.names == table.names
    assert part.fetch(torch.tensor([1]))["labels"].tolist() == [1] and part.column("labels").tolist() == [4, 1]
    assert part.row_digests([0]) == table.row_digests([4]) and PEOPLE > 12
