"""The autoencoder bench: its testbed learns, and what the table says of images is what the judges say of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge.audits.metrics.class_samples import ClassExam
from expunge.benchmarks import vae
from expunge.benchmarks.table_file import read
from expunge.errors import BadSetting


class Shades(torch.nn.Module):
    """Draws class c as the constant c / 9 whatever z is; of class 2, NaN."""

    latent = 1

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def decode(self, z, c):
        shade = torch.where(c == 2, float("nan"), c / 9)
        return shade[:, None, None, None].expand(-1, 1, 2, 2)


def by_shade(images):
    """Certain of the shade's class, but of black half and half that it is 0 or 5."""
    found = torch.nn.functional.one_hot((images[:, 0, 0, 0] * 9).round().long(), 10).double()
    found[found[:, 0] == 1] = torch.tensor([0.5, 0, 0, 0, 0, 0.5, 0, 0, 0, 0], dtype=torch.float64)
    return found


def test_an_exam_reads_probability_entropy_and_the_rest_by_hand():
    exam = ClassExam(by_shade, target=0, classes=10, each=3)
    about, all_of_it = exam.about(Shades()), exam.answers(Shades())
    assert len(about.asked) == 3 and len(all_of_it.asked) == 30
    assert about.probabilities[:, 0].mean() == 0.5 and np.allclose(about.entropy, np.log(2))
    assert exam.recalled(Shades()).tolist() == [1.0] * 3  # 0 is first among equals
    assert exam.useful(Shades()).sum() == 3 * 8  # all but class 2, whose images are not finite
    mirrored = ClassExam(by_shade, target=9, classes=10, each=3, view=lambda x: 1 - x)
    assert mirrored.about(Shades()).probabilities[:, 0].mean() == 0.5  # the judge sees 9 as black
    for wrong in ({"target": 10}, {"classes": 1}):
        with pytest.raises(BadSetting):
            ClassExam(by_shade, **{"target": 0, "classes": 10, **wrong})


def test_an_exam_with_a_judge_that_cannot_tell_real_digits_is_refused():
    class Poor:
        accuracy, tested, domain = 0.5, 10, "digit"

    with pytest.raises(Exception, match="0.97"):
        ClassExam(Poor(), 0, 10)


def test_the_testbed_learns_in_a_few_updates_and_resets_itself():
    case = vae.digits_case(epochs=2)
    assert sum(p.numel() for p in case.model.parameters()) == 36_688
    assert all(torch.equal(x, y) for x, y in zip(case.fresh(3).parameters(), case.fresh(3).parameters(), strict=True))
    from expunge.engine import fit

    trained, task = fit(case, "train", seed=0), case.task
    before, after = (task.evaluate(m, case.split("test").batches())["elbo"] for m in (case.fresh(0), trained))
    assert after > before + 5


def test_the_table_has_a_row_for_each_model_and_an_interval_over_seeds():
    score = dict.fromkeys(vae.COLUMNS, 1.0)
    seeds = [{"original": {**score, "probability": p}, "fine_tune": score} for p in (0.1, 0.2, 0.3)]
    table = vae.markdown(seeds)
    section = read(f"# vae\n\n## digits\n\nnote\n\n{table}")["digits"]
    assert list(section.rows) == ["original", "fine_tune"]
    assert section.rows["original"].startswith("| original | 0.2 ± 0.25 | 1 |")  # 4.303 * 0.1 / sqrt(3)
