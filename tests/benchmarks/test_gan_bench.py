"""The GAN bench on made-up rows, and its short-trained testbed: the table says what holds, and where it does not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from expunge.benchmarks import gan
from expunge.benchmarks.style_gan import ModulatedConv, style_gan
from expunge.engine import fit
from expunge.tasks.gan import Gan

EL2, PLAIN = "adapt_then_unlearn, el2", "fine_tune_positives"


def row(pul: float, fid: float, ret: float, collapsed: bool = False) -> dict:
    return {
        "pul": pul,
        "share": 1.0,
        "entropy": 0.9,
        "least": 5.0,
        "collapsed": collapsed,
        "fid": fid,
        "ret_fid": ret,
        "like none": 2.0,
    }


def test_claims_are_counted_seed_by_seed():
    good = {
        "original": row(0, 20, 35),
        "retrained": row(95, 30, 20),
        PLAIN: row(60, 30, 25),
        EL2: row(85, 40, 39),
        gan.EQUAL: row(85, 60, 50),
    }
    bad = {**good, EL2: row(59, 70, 41, True)}
    strict = {**bad, f"{EL2}, strict": row(90, 70, 41)}
    assert gan.claims({0: bad, 1: strict})["PUL(el2, strict) >= 80"] == [False, True]
    found = gan.claims({0: good, 1: bad})
    assert list(found.values()) == [[True, False]] * 7
    table = gan.markdown({0: good, 1: bad})
    line = next(line for line in table.splitlines() if line.startswith(f"| {EL2}"))
    assert "| 72 ± " in line and line.endswith("| 1 of 2 |")
    assert next(line for line in table.splitlines() if line.startswith("| original")).startswith("| original | 0 |")


def test_a_modulated_convolution_equals_weights_of_each_example_s_own():
    torch.manual_seed(0)
    layer, x, style = ModulatedConv(3, 5, 3, 4), torch.randn(2, 3, 6, 6), torch.randn(2, 4)
    got = layer(x, style)
    for i in range(2):
        weight = layer.weight / (3 * 9) ** 0.5 * layer.modulation(style)[i][None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        by_hand = torch.nn.functional.conv2d(x[i : i + 1], weight, layer.bias, padding=1)
        assert torch.allclose(got[i], by_hand[0], atol=1e-5)


def test_the_limit_of_a_filter_is_what_it_lets_pass():
    """Ten samples, four of them sevens to the scoring judge, of which the filter lets one pass among six positives."""
    labels = torch.tensor([7, 7, 7, 1, 2, 3, 4, 5, 6, 7])  # the last negative is no seven to the scoring judge
    seen = np.array([7, 7, 7, 7, 2, 3, 4, 5, 6, 9])
    data = SimpleNamespace(columns={"inputs": torch.zeros(10, 1), "labels": labels})
    exam = SimpleNamespace(classes=lambda _: seen, target=7)
    assert gan.limit(SimpleNamespace(data=data), exam) == pytest.approx(100 * (1 - (1 / 6) / (4 / 10)))


def test_walking_is_linear_and_keeps_the_ends():
    torch.manual_seed(0)
    a, b = style_gan(width=4, latent=4), style_gan(width=4, latent=4)
    half = gan.walked(a, b, 0.5)
    for p, q, h in zip(a.parameters(), b.parameters(), half.parameters(), strict=True):
        assert torch.allclose(h, (p + q) / 2, atol=1e-4)  # the mapping's weights are around 100


def test_the_testbed_is_small_resets_itself_and_starts_to_learn():
    """A few updates on real digits: nearer to them than before; the fresh pair is a function of its seed."""
    case = gan.digits_case(epochs=1)
    assert sum(p.numel() for p in case.model.parameters()) < 5e5
    assert all(torch.equal(x, y) for x, y in zip(case.fresh(3).parameters(), case.fresh(3).parameters(), strict=True))
    few = case.split("retain").subset(torch.arange(320), "retain")
    trained = fit(case, few, seed=0)
    task = Gan()
    before, after = (task.evaluate(m, few.batches())["frechet"] for m in (case.fresh(0), trained))
    assert after < before
    made = task.sample(trained, 5)
    assert made.shape == (5, 1, 8, 8) and bool(torch.isfinite(made).all())


def test_every_model_and_every_row_of_every_seed_is_a_process_of_its_own(monkeypatch, tmp_path):
    jobs = []
    monkeypatch.setattr(gan, "filter_judge", lambda: None)
    monkeypatch.setattr(gan.subprocess, "run", lambda job, **_: jobs.append(job))
    gan.everything(3, 4, tmp_path)
    made = [(job[3], job[job.index("--seed") + 1], job[-1]) for job in jobs]
    assert len(set(made)) == len(made) == 3 * 2 + 3 * (1 + len(gan.ROWS))
    assert {kind for kind, *_ in made[:6]} == {"train"} and {kind for kind, *_ in made[6:]} == {"rows"}


def test_extrapolation_is_read_at_the_length_whose_unlearning_is_nearest(tmp_path):
    walks = [{**row(p, 10 * p, p), "length": p / 50} for p in (20, 60, 90)]
    files = {"a": {EL2: row(70, 1, 1)}, "b": {"extrapolation": {**row(60, 1, 1), "walks": walks}}}
    for name, content in files.items():
        (tmp_path / "seed0").mkdir(exist_ok=True)
        (tmp_path / "seed0" / f"{name}.json").write_text(json.dumps(content))
    assert gan.read(tmp_path, 3) == {
        0: {EL2: row(70, 1, 1), "extrapolation": files["b"]["extrapolation"], gan.EQUAL: walks[1]}
    }


def test_a_table_without_rows_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match="rows --seed 0"):
        gan.main(["table", "--folder", str(tmp_path)])
