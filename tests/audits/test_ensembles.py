"""The checks over many models, with matrices whose truth is known."""

import numpy as np
import pytest
import torch

from expunge.audits import Subjects, run_checks
from expunge.errors import BadSetting, UnmetNeed

from .test_subjects import Counting, small_case


class Handed:
    """Answers like `engine.ensemble.Ensemble`."""

    def __init__(self, matrices):
        self.matrices = matrices

    def signals(self, split, name="margin"):
        return torch.tensor(self.matrices[split.name, name])


def matrices(shift, seed, models=40, wide=1.0):
    rng = np.random.default_rng(seed)
    sizes = {"forget": 6, "retain": 24, "test": 10, "holdout": 10}
    found = {}
    for split, n in sizes.items():
        margins = rng.normal(shift if split == "forget" else 0.0, wide, (models, n))
        found[split, "margin"] = margins
        found[split, "confidence"] = 1 / (1 + np.exp(-margins))
    return found


def audit(**ensembles):
    case = small_case()
    models = [Counting(seed) for seed in range(4)]
    return Subjects(case, *models, ensembles=ensembles, resamples=20)


def test_klom_quality_and_u_lira_tell_original_from_independent_retrained():
    handed = {
        "original": matrices(8, 0),
        "unlearned": Handed(matrices(0, 1)),
        "retrained": Handed(matrices(0, 2)),
        "floor": matrices(0, 3),
    }
    found = {
        (row.name, row.split): row for row in run_checks(audit(**handed), ["klom", "u_lira", "forgetting_quality"])
    }
    klom = found["klom_mean_forget", "forget"]
    assert klom.original > 5 * klom.floor and klom.unlearned < 1.5 * klom.floor and klom.retrained == 0
    assert found["klom_p95_forget", "forget"].unlearned >= klom.unlearned
    assert found["klom_mean_retain", "retain"].original < 1.5 * found["klom_mean_retain", "retain"].floor
    lira = found["u_lira_accuracy", "forget"]
    assert lira.original > 0.95 and lira.unlearned == pytest.approx(0.5, abs=0.08) and lira.floor < 0.08
    quality = found["forgetting_quality", "forget"]
    ceiling = 1 - quality.floor
    assert quality.original < 0.2 * ceiling and "ceiling" in quality.note and quality.retrained == 1
    over = found["forgetting_over_ceiling", "forget"]
    assert over.unlearned == pytest.approx(quality.unlearned / ceiling)
    assert found["forgetting_epsilon", "forget"].original > found["forgetting_epsilon", "forget"].unlearned
    assert len(klom.per_example["unlearned"]) == 6


def test_without_a_second_ensemble_halves_of_equal_size_are_compared():
    plain = {split: part for (split, name), part in matrices(0, 1).items() if name == "margin"}
    found = run_checks(audit(unlearned=plain, retrained=matrices(0, 2)), ["klom"])[0]
    assert "halves" in found.note and "N=20" in found.note and found.original is None and found.floor > 0


def test_a_mapping_may_hold_the_forget_split_only():
    unlearned, retrained = ({"forget": matrices(0, seed)["forget", "margin"]} for seed in (1, 2))
    assert {row.split for row in run_checks(audit(unlearned=unlearned, retrained=retrained), ["klom"])} == {"forget"}


def test_wrong_shapes_and_missing_signals_are_told():
    with pytest.raises(BadSetting, match=r"\(models, 6\) on forget, found \(5, 7\)"):
        run_checks(audit(unlearned={"forget": np.zeros((5, 7))}, retrained=matrices(0, 1)), ["klom"])
    with pytest.raises(UnmetNeed, match="confidence"):
        run_checks(audit(retrained={"forget": np.zeros((5, 6))}), ["rmia"])
    with pytest.raises(UnmetNeed, match="engine.ensemble"):
        audit().matrix("retrained", "forget")


def test_rmia_on_memorised_digits_by_retrained_references(toy):
    case = toy["case"]
    source = Subjects(case, toy["original"], toy["original"], toy["floor"])
    references = {
        (split, "confidence"): source.signal("retrained", split, "confidence")[None]
        for split in ("forget", "holdout", "test")
    }
    subjects = Subjects(
        case, toy["original"], toy["retrained"], toy["retrained"], ensembles={"retrained": references}, resamples=20
    )
    row = run_checks(subjects, ["rmia"])[0]
    assert row.original > 0.8 and row.retrained == pytest.approx(0.5, abs=0.1) and row.gap == 0
