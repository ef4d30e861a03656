"""The language checks on a small trained model: what an original that recites and a retrained that does not must show."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from tests.toys import FORGOTTEN, PEOPLE, facts, toy, words_tokenizer

from expunge.audits import Subjects, run_checks
from expunge.audits.attacks import membership as rules
from expunge.audits.attacks.token_membership import MORE_PASSES, ONE_PASS
from expunge.audits.metrics import memorisation, tofu, tofu_checks
from expunge.audits.metrics.text import extraction_likelihood, few_shot_prompt, rouge_l_recall
from expunge.audits.metrics.token_statistics import token_statistics
from expunge.cases.text import question_answer
from expunge.cases.tofu import candidates
from expunge.engine import fit
from expunge.errors import BadData, BadSetting, MissingGold, UnmetNeed
from expunge.records import Measurement as Record

ASPECTS = 3
CHECKS = (
    "probability", "exact_memorisation", "extraction_strength", "token_membership", "privleak", "rouge", "truth_ratio",
    "forget_quality", "model_utility", "verbmem", "knowmem_forget", "knowmem_retain",
)  # fmt: skip


def perturbed(people):
    """The facts of these people, each with three wrong answers: what holds for the next three of them."""
    questions, answers, person = facts(people)
    rows = []
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        others = [(i + ASPECTS * k) % len(questions) for k in (1, 2, 3)]
        wrong = [answers[j].replace(f"p{person[j]} ", f"p{person[i]} ") for j in others]
        rows.append({"question": question, "answer": answer, "perturbed_answer": wrong})
    return rows


@cache
def models():
    """case with probes, original, retrained, a second retrained seed."""
    found, table = (
        toy("language"),
        lambda people: candidates(words_tokenizer(), perturbed(people), template="{question}"),
    )
    kept, gone = range(PEOPLE - FORGOTTEN), range(PEOPLE - FORGOTTEN, PEOPLE)
    shots = list(zip(*facts(range(1))[:2], strict=True))

    def asked(people):
        questions, answers, _ = facts(people)
        return question_answer(words_tokenizer(), questions, answers, template=lambda q: few_shot_prompt(shots, q))

    probes = {
        "forget_perturbed": table(gone), "retain_perturbed": table(kept),
        "knowmem_forget": asked(gone), "knowmem_retain": asked(kept),
    }  # fmt: skip
    return found.case.with_(probes=probes), found.original, found.retrained, fit(found.case, "retain", 7)


def subjects(unlearned=None, **changes):
    case, original, retrained, second = models()
    given = {"retrained": retrained, "floor": second, "resamples": 40} | changes
    return Subjects(given.pop("case", case), original, original if unlearned is None else unlearned, **given)


@cache
def audit():
    """Nothing was unlearned: the unlearned model is the original."""
    return subjects()


@cache
def measured():
    return {
        row.name: row
        for row in run_checks(audit(), CHECKS, {"model_utility": {"new_tokens": 12}, "rouge": {"new_tokens": 12}})
    }


def test_every_measurement_fits_the_record_with_intervals_around_its_values():
    for row in measured().values():
        Record.model_validate(row.as_dict())
        json.dumps(row.as_dict(extras=True))
        assert row.floor is not None and row.floor >= 0 and row.unlearned == row.original
        for subject in ("original", "unlearned", "retrained"):
            low, high = row.intervals[subject]
            assert low <= getattr(row, subject) + 1e-9 and getattr(row, subject) - 1e-9 <= high
    assert len({(row.name, row.split) for row in measured().values()}) == len(measured())


def test_one_pass_scores_find_the_members_of_the_original_and_none_of_the_retrained():
    seeds = subjects(unlearned=models()[3], retrained=models()[2])
    for name in ONE_PASS:
        row = measured()[f"membership_{name}_auc"]
        assert row.original >= 0.8, name
        # Two retrained seeds must not be told apart: their AUCs differ by less than their intervals' width.
        pair = [
            rules.auc(*(seeds.signal(s, split, name) for split in ("forget", "holdout")))
            for s in ("unlearned", "retrained")
        ]
        low, high = row.intervals["retrained"]
        assert abs(pair[0] - pair[1]) == pytest.approx(row.floor) and row.floor < high - low, name
        # ... and on a model that never saw the rows a score knows no more than that
        assert abs(row.retrained - 0.5) <= max(row.floor, (high - low) / 2), name
        assert row.original > row.retrained + 0.2, name


def test_a_second_seed_in_place_of_the_unlearned_has_privleak_near_zero():
    rows = run_checks(subjects(unlearned=models()[3]), ["privleak", "forget_quality"])
    leak, quality = rows[0], next(row for row in rows if row.name == "forget_quality")
    assert leak.retrained == 0.0 and leak.intervals["retrained"] == (0.0, 0.0)
    assert leak.original < -60 and abs(leak.unlearned) < abs(leak.original) / 2
    assert quality.retrained == 0.0 and quality.unlearned > quality.original and "never rank" in quality.note
    # By its own definition, from the membership scores of both models.
    areas = [
        rules.auc(*(audit().signal(s, split, "min_k_40") for split in ("forget", "holdout")))
        for s in ("original", "retrained")
    ]
    assert leak.original == pytest.approx(100 * ((1 - areas[0]) - (1 - areas[1])) / (1 - areas[1]))


def test_extraction_strength_is_what_greedy_decoding_brings_back():
    data, task, model = models()[0].split("forget").data, models()[0].task, models()[1]
    ids = models()[0].split("forget").ids
    strengths = memorisation.extraction_strength(memorisation.tokens(audit(), "original", "forget").hits)
    assert 0 < strengths.mean() < 1
    for prompt, answer, strength in zip(data.prompt_ids(ids), data.answer_ids(ids), strengths, strict=True):
        start = round(len(answer) * (1 - strength))
        for k in {start, max(start - 1, 0)}:
            made = (
                task.generate(model, [prompt + answer[:k]], max_new_tokens=len(answer) - k)[0]
                if k < len(answer)
                else []
            )
            assert (made == answer[k:]) == (k == start)


def test_losses_of_candidates_are_sorted_by_question():
    found = tofu_checks.losses(audit(), "original", "probe:forget_perturbed")
    own = audit().losses("original", "forget")  # the same questions in the same order
    np.testing.assert_allclose(found.answer, own, atol=1e-5)
    assert found.wrong.shape == (len(own), 3) and found.right is found.answer
    ratios = tofu.truth_ratio_geometric(found.right, found.wrong)
    assert measured()["truth_ratio_forget"].original == pytest.approx(tofu.closer_to_1_better(ratios))
    assert measured()["forget_quality"].per_example["original"] == pytest.approx(ratios.tolist())


def test_model_utility_is_the_harmonic_mean_of_what_there_is_and_says_so():
    rows = measured()
    parts = [rows[f"utility_{name}_retain"].original for name in ("probability", "rouge_l_recall", "truth_ratio")]
    assert rows["model_utility"].original == pytest.approx(3 / sum(1 / part for part in parts))
    assert "not TOFU's nine" in rows["model_utility"].note and rows["model_utility"].note.startswith("3 components")
    assert rows["utility_probability_retain"].original == pytest.approx(rows["probability_retain"].original, abs=1e-5)
    cheap = run_checks(audit(), ["model_utility"], {"model_utility": {"generate": False}})[0]
    assert cheap.original == pytest.approx(2 / (1 / parts[0] + 1 / parts[2])) and "ROUGE left out" in cheap.note


def test_rouge_is_of_greedy_answers_to_the_questions():
    split, model, task = models()[0].split("forget"), models()[1], models()[0].task
    made = [task.generate(model, [p], 12, end=split.data.end)[0] for p in split.data.prompt_ids(split.ids)]
    truths = [split.data.decode(answer) for answer in split.data.answer_ids(split.ids)]
    slow = rouge_l_recall([split.data.decode(row) for row in made], truths)
    assert measured()["rouge_l_recall_forget"].original == pytest.approx(slow.mean())


def test_tables_answered_together_say_what_each_says_alone_and_are_asked_once(monkeypatch):
    together, probes = subjects(), [tofu_checks.RETAIN, tofu_checks.FORGET]
    asked, plain = [], type(together.task).generate
    monkeypatch.setattr(
        type(together.task),
        "generate",
        lambda task, model, prompts, *a, **k: asked.append(len(prompts)) or plain(task, model, prompts, *a, **k),
    )
    found = tofu_checks.recalls(together, "original", probes, 20)
    assert len(asked) == 1
    for probe, values in zip(probes, found, strict=True):
        np.testing.assert_array_equal(values, tofu_checks.recall(subjects(), "original", probe, 20))
        assert tofu_checks.recall(together, "original", probe, 20) is values


def test_a_pass_reads_loss_score_and_utility_off_one_table_of_token_statistics(monkeypatch):
    case, original, *_ = models()
    split, task, tables = case.split("retain"), type(case.task), []
    statistics = task.statistics
    monkeypatch.setattr(task, "statistics", lambda *a: tables.append(1) or statistics(*a))
    passed = subjects().passed("original", "retain")
    batches = -(-len(split) // 64)
    assert len(tables) == batches
    batch = split.data.fetch(split.ids)
    with torch.no_grad():
        output = case.task.forward(original.eval(), batch)
        np.testing.assert_allclose(passed.loss, case.task.loss(output, batch).numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(passed.forget_score, case.task.forget_score(output, batch).numpy(), rtol=1e-5)
    assert passed.utility["loss"] == pytest.approx(passed.loss.mean()) and passed.utility["n"] == len(split)


def test_everything_missing_is_told_at_once_with_its_remedy():
    case, original, retrained, _ = models()
    bare = Subjects(case.with_(probes={}), original, original, retrained)
    with pytest.raises(UnmetNeed, match=r"probes=\{'forget_perturbed'.*\n.*probes=\{'knowmem_forget'") as caught:
        run_checks(bare, ["truth_ratio", "knowmem_forget"])
    assert "truth_ratio: expected the case to have the probe table" in str(caught.value)
    with pytest.raises(MissingGold):
        run_checks(Subjects(case, original, original), ["forget_quality"])
    with pytest.raises(UnmetNeed, match="task among language"):
        run_checks(
            Subjects(toy("class").case, toy("class").original, toy("class").original, toy("class").retrained),
            ["privleak"],
        )


def test_a_table_without_wrong_answers_is_refused():
    rows = [row | {"perturbed_answer": []} for row in perturbed(range(3))]
    case = models()[0].with_(probes={"forget_perturbed": candidates(words_tokenizer(), rows, template="{question}")})
    with pytest.raises(BadData, match="equally many wrong answers"):
        run_checks(subjects(case=case), ["truth_ratio"])


def test_scores_with_passes_of_their_own():
    rows = {row.name: row for row in run_checks(audit(), ["membership_passes"])}
    for name in MORE_PASSES:
        row = rows[f"membership_{name}_auc"]
        Record.model_validate(row.as_dict())
        assert 0 <= row.original <= 1
    assert rows["membership_reference_auc"].original >= 0.8 and rows["membership_gradnorm_auc"].original >= 0.7
    assert rows["membership_lower_case_auc"].original == 0.5  # these texts have no capitals
    assert "shots fit" in rows["membership_recall_auc"].note
    with pytest.raises(BadSetting, match="Did you mean 'gradnorm'"):
        run_checks(audit(), ["membership_passes"], {"membership_passes": {"scores": ["gradnorms"]}})


def test_extraction_likelihood_equals_a_loop_over_prefixes():
    split, model, task = models()[0].split("forget"), models()[1], models()[0].task
    rows = split.subset(torch.arange(2))
    slow = []
    for i in rows.ids.tolist():
        text = rows.data.tokens[i]
        made = [task.generate(model, [text[:k]], max_new_tokens=len(text) - k)[0] for k in range(1, len(text))]
        slow.append(extraction_likelihood(made, text, 2))
    np.testing.assert_allclose(memorisation.el(task, model, split, 2, 2), slow)
    assert np.mean(slow) > 0


def test_an_audit_of_another_method_takes_over_what_ran_on_the_references():
    other = subjects(unlearned=models()[3])
    other.share(audit())
    kept = audit().passed("original", "forget")
    assert other.passed("original", "forget") is kept
    assert other.over("pass", "unlearned", "forget", lambda *_: "anew") == "anew"


def test_tokens_of_the_shared_pass_are_those_of_a_pass_of_their_own():
    case, original, *_ = models()
    own = token_statistics(case.task, original, case.split("forget"), batch_size=5)
    shared = memorisation.tokens(audit(), "original", "forget")
    for name in ("log_p", "mean", "spread", "hits"):
        for slow, row in zip(getattr(own, name), getattr(shared, name), strict=True):
            np.testing.assert_allclose(row, slow, atol=1e-5)
