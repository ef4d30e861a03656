"""PUL, the collapse guard and the exam of generators, against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from expunge.audits.base import run_checks
from expunge.audits.metrics.gan import GanExam, diversity, pul
from expunge.audits.subjects import Subjects
from expunge.cases.feedback import feedback, verify_independent
from expunge.errors import BadSetting
from expunge.tasks.gan import GanPair, frechet
from gan_ring import FORGET, MODES, RingGenerator, build, chances, judge, real_case, retrained, ring, ring_case


def test_pul_is_0_unchanged_100_when_none_is_left_and_negative_when_there_are_more():
    before = np.array([1, 1, 0, 0, 1], dtype=bool)
    assert pul(before, before) == 0
    assert pul(before, np.zeros(5, dtype=bool)) == 100
    assert pul(before, np.array([1, 0, 0, 0, 0], dtype=bool)) == pytest.approx(200 / 3)
    assert pul(before, np.ones(5, dtype=bool)) == pytest.approx(-200 / 3)
    assert math.isnan(pul(np.zeros(5, dtype=bool), before))
    with pytest.raises(BadSetting, match="same latents"):
        pul(before, before[:3])


def test_the_collapse_guard_on_known_histograms():
    even = np.repeat(np.arange(10), 20)
    found = diversity(even, 10, target=7)
    assert found.entropy == pytest.approx(1) and found.least == pytest.approx(1 / 9) and not found.collapsed
    assert 7 not in found.shares and sum(found.shares.values()) == pytest.approx(1)
    one = diversity(np.zeros(50, dtype=int), 10, target=7)
    assert one.entropy == 0 and one.collapsed
    missing = diversity(
        even[even != 3], 10, target=7
    )  # eight of nine classes: entropy ln 8 / ln 9 is high, a class is gone
    assert missing.entropy == pytest.approx(math.log(8) / math.log(9)) and missing.collapsed
    assert diversity(np.full(9, 7), 10, target=7).collapsed  # nothing but the target
    shares = np.array([0.5, 0.3, 0.2])
    entropy = -(shares * np.log(shares)).sum() / np.log(3)
    assert diversity(np.repeat([0, 1, 2], [50, 30, 20]), 3).entropy == pytest.approx(entropy)


def exam(**more) -> GanExam:
    x, y = ring(512, 2)
    return GanExam(judge, FORGET, count=1500, seed=3, reference=x, labels=y, **more)


def test_the_judge_that_filtered_may_not_score():
    case = ring_case()
    with pytest.raises(BadSetting, match="train a second one"):
        feedback(case.model, judge, FORGET, samples=50, exam=exam())
    verify_independent(chances, case.notes["feedback"])
    subjects = Subjects(case.with_(exam=exam()), case.model, case.model, retrained())
    with pytest.raises(BadSetting, match="train a second one"):
        run_checks(subjects, ["pul"])


def test_checks_of_the_unchanged_generator_and_of_retrained():
    case = real_case().with_(exam=exam())
    found = {
        m.name: m
        for m in run_checks(
            Subjects(case, case.model, case.model, retrained()), ["pul", "sample_diversity", "sample_distance"]
        )
    }
    assert found["pul"].original == found["pul"].unlearned == 0
    assert found["pul"].retrained > 90 and found["target_share"].retrained < 3
    low, high = found["pul"].intervals["retrained"]
    assert low <= found["pul"].retrained <= high <= 100
    assert found["sample_diversity"].retrained > 0.9 and "none below" in found["sample_diversity"].note
    assert found["ret_fid"].retrained < found["ret_fid"].unlearned  # the original still draws what is to go
    e = exam()
    samples = e.samples(retrained())
    by_hand = frechet(samples[0], e.reference[e.labels != FORGET])
    assert found["ret_fid"].retrained == pytest.approx(by_hand)


def test_a_collapsed_generator_is_named():
    class OnePoint(RingGenerator):
        def forward(self, z):
            return 0 * super().forward(z) + torch.tensor([1.0, 0.0])

    case = real_case().with_(exam=exam())
    stuck = GanPair(OnePoint(), build().discriminator)
    found = {m.name: m for m in run_checks(Subjects(case, case.model, stuck, retrained()), ["pul", "sample_diversity"])}
    assert found["pul"].unlearned == 100 and found["sample_diversity"].unlearned == 0
    assert "collapsed: unlearned" in found["sample_diversity"].note


def test_recalled_and_useful_count_finite_samples_alone():
    class Broken(RingGenerator):
        def forward(self, z):
            return torch.where(z[:, :1] > 0, float("nan"), super().forward(z))

    torch.manual_seed(0)
    model = GanPair(Broken(), build().discriminator)
    e = exam()
    finite = e.samples(model)[1]
    assert 0.4 < finite.mean() < 0.6
    assert e.useful(model).mean() == finite.mean() and not e.recalled(model)[~finite].any()
    assert e.known == MODES
