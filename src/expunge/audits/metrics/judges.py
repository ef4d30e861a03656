"""Judges: classifiers trained on real images only, which say what a generated image shows, and how far they can be trusted.

A judge forced to choose among known labels calls noise something, so each carries a reject test: an image that lies further
from every real training image than unseen real images do, in pixels or in another network's features, is no answer.
Images are mapped to uint8 once and every judge and metric sees the same bytes (generation audits, "Pixel handling").

    judge = cnn_judge("style", names, train, train_labels, test, test_labels)
    judge(images)              # (N, K) probabilities of judge.names
    judge.rejected(images)     # (N,) True where the image is like no real one
    judge.accuracy             # on the held-out real images, to be printed beside every number
    require(judge, floor=0.97) # raises JudgeBelowFloor
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.errors import BadData, JudgeBelowFloor
from expunge.files import digest_bytes, digest_weights
from expunge.seeds import derive, generator

FLOOR = 0.97
REJECTED_REAL = 0.01
"""Share of held-out real images that the reject test may turn away; sets its limits."""
KNOWN = 6000


def to_uint8(images: Tensor) -> Tensor:
    """(N, C, H, W) uint8 of float images in [-1, 1], clamped; uint8 images pass as they are."""
    if images.dtype == torch.uint8:
        return images
    if not torch.isfinite(images).all():
        raise BadData(
            "expected finite images in [-1, 1] to judge, found NaN or infinite pixels; drop these images and count them"
        )
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _floats(images: Tensor) -> Tensor:
    """(N, C, H, W) float32 in [-1, 1], through uint8."""
    return to_uint8(images).float() / 127.5 - 1


class SmallNet(nn.Module):
    """Convolutions with batch norm, halved down to at most 4 x 4, then 64 features and K logits."""

    num_features = 64  # the name under which torchmetrics looks for it

    def __init__(self, channels: int, size: int, classes: int, width: int = 32):
        super().__init__()
        layers: list[nn.Module] = [*_convolution(channels, width), *_convolution(width, 2 * width), nn.MaxPool2d(2)]
        width, size = 2 * width, size // 2
        while size > 4:
            layers += [*_convolution(width, 2 * width), *_convolution(2 * width, 2 * width), nn.MaxPool2d(2)]
            width, size = 2 * width, size // 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Linear(width * size * size, self.num_features)
        self.head = nn.Linear(self.num_features, classes)

    def features(self, images: Tensor) -> Tensor:
        """(N, 64) of (N, C, H, W) float images in [-1, 1]."""
        return self.hidden(self.body(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).relu())


def _convolution(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]


def fit_net(
    images: Tensor, labels: Tensor, classes: int, seed: int, steps: int = 600, width: int = 32, augment: bool = False,
    device: str | torch.device = "cpu",
) -> SmallNet:  # fmt: skip
    """A SmallNet trained by AdamW (one cycle to 3e-3, batch 128) on images (N, C, H, W) and labels (N,); in eval mode.

    augment: flips and shifts by up to an eighth, for photographs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "judge"))
        net = SmallNet(images.shape[1], images.shape[-1], classes, width).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    draws = generator(seed, "judge", "rows")
    images, labels = _floats(images).to(device), labels.to(device)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,), generator=draws).to(device)
        batch = images[rows]
        loss = F.cross_entropy(net(_augmented(batch, draws) if augment else batch), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def _augmented(images: Tensor, draws: torch.Generator) -> Tensor:
    """Half of the images flipped, the batch cropped at one random place of its padded self."""
    size, reach = images.shape[-1], images.shape[-1] // 8
    flip = torch.rand(len(images), generator=draws).to(images.device) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    y, x = torch.randint(2 * reach + 1, (2,), generator=draws).tolist()
    return F.pad(images, (reach,) * 4, mode="reflect")[..., y : y + size, x : x + size]


def _in_batches(function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, size: int = 512) -> Tensor:
    with torch.no_grad():
        return torch.cat([function(_floats(part).to(device)).float().cpu() for part in images.split(size)])


class Features(nn.Module):
    """(N, C, H, W) uint8, or float in [-1, 1] -> (N, 64): the penultimate layer, for FID and KID.

    torchmetrics takes it as `FrechetInceptionDistance(feature=features, normalize=False)` with uint8 images.
    """

    num_features = SmallNet.num_features

    def __init__(self, net: SmallNet):
        super().__init__()
        self.net = net.eval()
        self.digest = digest_weights(net.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        return _in_batches(self.net.features, images, next(self.net.parameters()).device)


@dataclass(frozen=True)
class Reject:
    """Distance to the nearest real training image, in pixels and in `features`, each against the limit that all but half of
    REJECTED_REAL of the unseen real images keep. An image over either limit is like no real one.

    Pixels turn away noise and constants at 8x8, where a network's features do not (half of uniform noise passes them); features
    turn away what is smooth and empty at sizes where any flat image is near some photograph.
    """

    features: Features
    pixels: Tensor  # (M, C * S * S) in [-1, 1], of at most KNOWN training images
    known: Tensor  # (M, 64), their features
    limits: tuple[float, float]

    @classmethod
    def fitted(cls, features: Features, train: Tensor, test: Tensor) -> Reject:
        """train: what is known; test: unseen real images (N, C, S, S), which set the limits."""
        if len(train) > KNOWN:
            train = train[torch.randperm(len(train), generator=generator(0, "reject"))[:KNOWN]]
        open_ended = cls(features, _floats(train).flatten(1), features(train), (0.0, 0.0))
        pixels, deep = (float(d.quantile(1 - REJECTED_REAL / 2)) for d in open_ended.distances(test))
        return cls(features, open_ended.pixels, open_ended.known, (pixels, deep))

    def distances(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) to the nearest training image in pixels, and in features."""
        pixels = torch.cat(
            [torch.cdist(p.flatten(1), self.pixels).min(1).values for p in _floats(images).cpu().split(512)]
        )
        return pixels, torch.cdist(self.features(images), self.known).min(1).values

    def __call__(self, images: Tensor) -> Tensor:
        pixels, deep = self.distances(images)
        return (pixels > self.limits[0]) | (deep > self.limits[1])


@dataclass(frozen=True)
class Judge:
    """probabilities: uint8 images -> (N, K). accuracy: on `tested` held-out real images. digest: of what was learned."""

    domain: str
    names: tuple[str, ...]
    probabilities: Callable[[Tensor], Tensor]
    reject: Reject
    accuracy: float
    tested: int
    digest: str

    def __call__(self, images: Tensor) -> Tensor:
        return self.probabilities(to_uint8(images))

    def rejected(self, images: Tensor) -> Tensor:
        """(N,) True where the image is like no real one: no answer, whatever its probabilities say."""
        return self.reject(to_uint8(images))

    def index(self, name: str) -> int:
        return self.names.index(name)

    def __str__(self) -> str:
        return f"{self.domain} judge: {self.accuracy:.4f} on {self.tested} held-out real images ({self.digest[:12]})"


def require(*judges: Judge, floor: float = FLOOR) -> None:
    """Raise JudgeBelowFloor when a judge's held-out accuracy is below `floor`: no table may be made with it."""
    for judge in judges:
        if judge.accuracy < floor:
            raise JudgeBelowFloor(
                f"expected a {judge.domain} judge with at least {floor:.2f} accuracy on held-out real images, found "
                f"{judge.accuracy:.4f} on {judge.tested}; train it longer or on more images, or lower the floor on purpose"
            )


def cnn_judge(
    domain: str, names: tuple[str, ...], net: SmallNet, reject: Reject, test: Tensor, test_labels: Tensor
) -> Judge:
    """A judge from a trained net (`fit_net`). reject's network should have another seed than `net`."""
    device = next(net.parameters()).device

    def probabilities(images: Tensor) -> Tensor:
        return _in_batches(lambda part: net(part).softmax(1), images, device)

    return _judged(domain, names, probabilities, reject, test, test_labels, digest_weights(net.state_dict()))


def svm_judge(
    domain: str, names: tuple[str, ...], train: Tensor, train_labels: Tensor, reject: Reject, test: Tensor,
    test_labels: Tensor,
) -> Judge:  # fmt: skip
    """scikit-learn's RBF support vector machine on pixels.

    Probabilities: softmax of its one-against-rest scores times the factor that makes the training labels likeliest under
    five-fold cross-validation. The arg max is the machine's own answer, which Platt's probabilities can contradict.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax
    from sklearn.model_selection import cross_val_predict
    from sklearn.svm import SVC

    machine = SVC(C=10.0, gamma="scale", decision_function_shape="ovr", break_ties=True, random_state=0)
    pixels, answers = _rows(train), train_labels.numpy()
    unseen = cross_val_predict(machine, pixels, answers, method="decision_function")
    machine.fit(pixels, answers)

    def surprise(factor: float) -> float:
        return -float(log_softmax(factor * unseen, axis=1)[np.arange(len(answers)), answers].mean())

    factor = float(minimize_scalar(surprise, bounds=(0.1, 100.0), method="bounded").x)

    def probabilities(images: Tensor) -> Tensor:
        return torch.from_numpy(factor * machine.decision_function(_rows(images))).float().softmax(1)

    learned = [machine.support_vectors_, machine.dual_coef_, machine.intercept_]
    digest = digest_bytes(b"".join(np.ascontiguousarray(part).tobytes() for part in learned))
    return _judged(domain, names, probabilities, reject, test, test_labels, digest)


def _rows(images: Tensor) -> np.ndarray:
    return _floats(images).flatten(1).cpu().numpy()


def _judged(
    domain: str, names: tuple[str, ...], probabilities: Callable[[Tensor], Tensor], reject: Reject, test: Tensor,
    labels: Tensor, digest: str,
) -> Judge:  # fmt: skip
    found = probabilities(to_uint8(test)).argmax(1)
    return Judge(domain, names, probabilities, reject, float((found == labels).float().mean()), len(labels), digest)
