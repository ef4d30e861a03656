"""Judges of generated images: trained on real ones, honest about their error, and able to say "none of these"."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from expunge.audits.metrics.judges import JudgeBelowFloor, require, to_uint8
from expunge.benchmarks.canvas import STYLES, digit_images, mini_canvas
from expunge.benchmarks.canvas_judges import canvas_judges, digit_judges, quality
from expunge.errors import BadData
from expunge.tasks.conditions import ClassConditions


@pytest.fixture(scope="module")
def digits():
    return digit_judges()


@pytest.fixture(scope="module")
def canvas():
    return canvas_judges()


def flat(channels: int) -> torch.Tensor:
    """Constant images from black to white, and pure colours."""
    grey = torch.linspace(-1, 1, 21).view(-1, 1, 1, 1).expand(-1, channels, 8, 8)
    if channels == 1:
        return grey
    colours = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).view(-1, 3, 1, 1).expand(-1, 3, 8, 8)
    return torch.cat([grey, colours])


def test_judges_are_right_on_held_out_real_images(digits, canvas):
    for judge, labels in (
        (digits.digit, digit_images("test")[1]),
        (canvas.style, mini_canvas("test").styles),
        (canvas.object, mini_canvas("test").objects),
    ):
        images = digit_images("test")[0] if judge is digits.digit else mini_canvas("test").images
        found = judge(images)
        assert found.shape == (len(images), len(judge.names))
        assert torch.allclose(found.sum(1), torch.ones(len(images)), atol=1e-5)
        assert judge.accuracy == pytest.approx((found.argmax(1) == labels).double().mean().item(), abs=1e-6)
        assert judge.accuracy >= 0.97 and judge.tested == len(images)
    assert canvas.style.names == tuple(STYLES)
    require(digits.digit, canvas.style, canvas.object)


def test_the_machines_probabilities_are_calibrated(digits):
    """Mean probability of its answer is within 0.03 of its accuracy: an uncalibrated softmax of the scores says 0.6."""
    sure = digits.digit(digit_images("test")[0]).max(1).values.mean().item()
    assert abs(sure - digits.digit.accuracy) < 0.03


def test_a_judge_below_its_floor_is_refused(digits):
    weak = replace(digits.digit, accuracy=0.93)
    with pytest.raises(JudgeBelowFloor, match=r"digit judge with at least 0\.97.*found 0\.9300.*lower the floor"):
        require(digits.digit, weak)
    require(weak, floor=0.9)


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_and_constants_are_rejected_and_real_images_are_not(channels, digits, canvas):
    judge = digits.digit if channels == 1 else canvas.object
    real = digit_images("test")[0] if channels == 1 else mini_canvas("test").images
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(200, channels, 8, 8, generator=draws)
    for fake in (noise, 0.5 * noise, 2 * torch.rand(noise.shape, generator=draws) - 1, flat(channels)):
        assert judge.rejected(fake).all()
        assert len(judge(fake).argmax(1)) == len(fake)  # it would have named a class for every one
    assert judge.rejected(real).float().mean() < 0.02


def test_pixels_become_bytes_once(digits):
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5)
    assert to_uint8(images).flatten().tolist() == [0, 0, 128, 255, 255]
    real = digit_images("test")[0][:50]
    assert torch.equal(digits.digit(real), digits.digit(to_uint8(real)))
    assert torch.equal(digits.features(real), digits.features(to_uint8(real)))
    with pytest.raises(BadData, match="found NaN"):
        to_uint8(torch.full((1, 1, 2, 2), float("nan")))


def test_the_order_of_images_changes_nothing(canvas):
    images = mini_canvas("test").images[:64]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(canvas.style(images)[order], canvas.style(images[order]), atol=1e-6)


def test_features_tell_real_halves_from_noise(digits):
    """The Frechet distance by its formula: 0 with itself, small between real halves, large to noise."""
    from scipy.linalg import sqrtm

    assert digits.features.digest != digits.digit.digest
    images, _ = digit_images("train")

    def distance(a, b):
        one, two = (digits.features(part).double().numpy() for part in (a, b))
        cov = np.cov(one.T), np.cov(two.T)
        middle = sqrtm(cov[0] @ cov[1] + 1e-9 * np.eye(64)).real
        return ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(cov[0] + cov[1] - 2 * middle)

    noise = torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert distance(images[:600], images[:600]) == pytest.approx(0, abs=1e-2)
    assert 0 < distance(images[:600], images[600:1200]) < 0.05 * distance(images[:600], noise)


class Artist(torch.nn.Module):
    """Draws real held-out digits of the class it is asked for, except of `hidden`, for which it draws noise or NaN."""

    kind, shape, device = "class", (1, 8, 8), torch.device("cpu")

    def __init__(self, hidden: int | None = None, fill: float | None = None):
        super().__init__()
        self.hidden, self.fill = hidden, fill
        self.conditions = ClassConditions(10, 10)

    def encode(self, condition, prefix=None):
        return condition

    def draw(self, noise, asked):
        images, labels = digit_images("test")
        drawn = torch.stack([images[labels == digit][row] for row, digit in enumerate(asked.tolist())])
        gone = noise if self.fill is None else torch.full_like(noise, self.fill)
        return drawn if self.hidden is None else torch.where((asked == self.hidden)[:, None, None, None], gone, drawn)

    def images(self, latents):
        return latents


def test_quality_counts_what_the_judge_sees(digits):
    """Real images: as right as the judge. Noise in place of one class of ten: that class is the worst, a tenth is rejected,
    NaN is wrong whatever its zeroed image looks like."""
    good = quality(Artist(), digits, each=2)
    assert good.accuracy["digit"] >= 0.95 and good.images == 20 and good.rejected <= 0.05
    for fill in (None, float("nan")):
        bad = quality(Artist(hidden=4, fill=fill), digits, each=2)
        assert bad.worst["digit"] <= 0.5 and bad.rejected >= 0.1
        assert bad.accuracy["digit"] <= good.accuracy["digit"] - 0.05
    gold = quality(Artist(hidden=4), digits, each=2, without=4)
    assert gold.images == 18 and gold.worst["digit"] == quality(Artist(), digits, each=2, without=4).worst["digit"]
