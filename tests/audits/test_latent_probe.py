"""The latent probe: power where features part the target from others, none where nothing does, and no condition is read."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from expunge import TensorData, requests
from expunge.audits import run_checks
from expunge.audits.attacks.latent_probe import latent_probe, middle_features, placements
from expunge.audits.base import checks
from expunge.audits.subjects import Subjects
from expunge.errors import BadSetting, MissingGold
from expunge.tasks.denoiser import Denoiser
from expunge.tasks.one_step import OneStep
from tiny_pipelines import class_case, text_case
from toys import toy


def test_placements_are_the_auc_of_probes_that_saw_neither_row():
    """Against scikit-learn, part by part; far apart 1, the other way about as well, labels that say nothing 0.5, ties 0.5 exactly."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    from expunge.seeds import derive

    rng = np.random.default_rng(0)
    target, others = rng.normal(size=(20, 3)) + 0.7, rng.normal(size=(40, 3))
    x, y = np.concatenate([target, others]), np.repeat([1, 0], [20, 40])
    parts = []
    for a, b in StratifiedKFold(5, shuffle=True, random_state=derive(3, "latent probe") % 2**32).split(x, y):
        mean, std = x[a].mean(0), x[a].std(0)
        probe = LogisticRegression(class_weight="balanced", max_iter=300, tol=1e-3).fit((x[a] - mean) / std, y[a])
        parts.append(roc_auc_score(y[b], probe.decision_function((x[b] - mean) / std)))
    assert placements(target, others, 3).mean() == pytest.approx(np.mean(parts), abs=1e-9)
    assert placements(target + 20, others, 0).mean() == placements(target - 20, others, 0).mean() == 1
    assert (placements(np.ones((20, 3)), np.ones((40, 3)), 0) == 0.5).all()
    same = [placements(*np.split(rng.normal(size=(160, 3)), [80]), seed).mean() for seed in range(10)]
    assert abs(np.mean(same) - 0.5) < 0.05


def test_features_are_the_mid_blocks_at_the_noised_rows_and_no_condition_is_read():
    case = text_case()
    rows = case.split("forget")
    found = middle_features(case.model, case, rows, 0.3, seed=4)
    batch = case.task.prepare(next(iter(rows.batches(256))), _rng(4, rows.name))
    unet, t = case.model.unet, torch.tensor(300)
    seen = []
    handle = unet.mid_block.register_forward_hook(lambda _, __, out: seen.append(out))
    null = case.model.encode(case.model.conditions.of([""]))
    for i in range(len(rows)):  # one by one
        a = case.model.scheduler.alphas_cumprod[300]
        noisy = a.sqrt() * batch["latents"][i : i + 1] + (1 - a).sqrt() * batch["noise"][i : i + 1]
        with torch.no_grad():
            unet(noisy, t, encoder_hidden_states=null)
    handle.remove()
    assert np.allclose(found, torch.cat(seen).mean((2, 3)).double(), atol=1e-5) and found.shape == (10, 16)
    columns = {name: case.data.column(name) for name in case.data.names}
    other = case.with_(data=TensorData(**columns | {"input_ids": columns["input_ids"].flip(0)}))
    assert not torch.equal(other.data.column("input_ids"), columns["input_ids"])
    assert np.array_equal(found, middle_features(case.model, other, other.split("forget"), 0.3, seed=4))


def _rng(seed, name):
    from expunge.seeds import generator

    return generator(seed, "latent probe", name, 0)


def test_power_on_a_class_none_on_rows_that_share_nothing_and_none_on_dead_features():
    """The trained class toy: images of a digit are parted from others; as many rows drawn at random are not; nor is anything by a
    network of zeros."""
    t = toy("class_images")
    dead = copy.deepcopy(t.case.model)
    for p in dead.unet.parameters():
        p.data.zero_()
    subjects = Subjects(t.case, t.case.model, dead, t.retrained, t.retrained)
    found, gain = latent_probe(subjects, levels=(0.1,))
    assert found.name == "probe_auc" and found.original > 0.85 and found.unlearned == 0.5
    assert len(found.per_example["original"]) == len(t.case.split("forget")) and found.direction == "match"
    fresh = subjects.model("untrained")
    by_hand = placements(
        *(middle_features(fresh, t.case, t.case.split(n), 0.1) for n in ("forget", "retain")), 0
    ).mean()
    assert gain.name == "probe_selectivity" and gain.original == pytest.approx(found.original - by_hand)
    assert gain.unlearned == pytest.approx(0.5 - by_hand)

    count, rng = len(t.case.split("forget")), np.random.default_rng(1)
    chance = []
    for _ in range(4):
        ids = rng.choice(len(t.case.data), count, replace=False)
        case = t.case.with_(request=requests.samples(sorted(ids.tolist())))
        none, _ = latent_probe(Subjects(case, case.model, case.model, case.model, case.model), levels=(0.1,))
        chance.append(none.original)
    assert abs(np.mean(chance) - 0.5) < 0.12 and found.original - max(chance) > 0.15


def test_the_level_is_where_the_original_gains_most_over_untrained_weights():
    """On the text toy a network of any weights parts red from the rest at little noise, and a trained one at more noise alone."""
    t = toy("captions")
    found, gain = latent_probe(Subjects(t.case, t.case.model, t.case.model, t.retrained, t.retrained))
    levels, curve = found.curves["original"]["level"], found.curves["original"]["auc"]
    assert f"at noise level {levels[-1]:g};" in found.note and found.original == curve[-1]
    assert gain.original > 0.05 and gain.retrained > 0.05  # and so is the retrained model's: the zero line is not 0.5


def test_what_cannot_be_probed_is_left_out_and_bad_levels_are_refused():
    assert "latent_probe" in checks("diffusion", attack=True)
    case = class_case()
    one = OneStep.around(copy.deepcopy(case.model), 440)
    assert latent_probe(Subjects(case, case.model, one, case.model, case.model)) == []
    pipe = case.model.pipeline()
    none = Denoiser(pipe, null=None)
    assert latent_probe(Subjects(case.with_(model=none), none, none, none, none)) == []
    assert latent_probe(Subjects(case, *[case.model] * 4)) == []  # four rows are too few for five parts
    with pytest.raises(BadSetting, match="shares of the schedule"):
        latent_probe(Subjects(case, *[case.model] * 4), levels=(0.0,))
    with pytest.raises(MissingGold):
        run_checks(Subjects(case, case.model, case.model), ["latent_probe"])
