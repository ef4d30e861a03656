"""Distances between sets of images, on the features of a network that is given: FID, KID, precision and recall, drift.

    FID = ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))                    Heusel et al., arXiv 1706.08500; biased upward for few images
    KID = unbiased MMD^2 with (x . y / d + 1)^3, mean over subsets          Binkowski et al., arXiv 1801.01401; can be below 0
    precision = share of generated images within the k-NN manifold of the real ones; recall: the other way round
                                                                           Kynkaanniemi et al., arXiv 1904.06991, k = 3

FID and KID are torchmetrics'. Numbers on features of different networks are not comparable, so the features' name goes with
every number; and two disjoint halves of the real images are apart as well, by the floor that is subtracted (`corrected`).
All sets are (N, C, H, W) uint8, the bytes that the judges see.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import BadData, BadModel, need_extra
from expunge.seeds import generator

NEIGHBOURS = 3
SUBSETS, SUBSET = 100, 1000


def fid(features: nn.Module, real: Tensor, generated: Tensor) -> float:
    """Frechet distance of the features' Gaussians; lower is nearer. features: uint8 images -> (N, d), with `num_features`."""
    metrics = need_extra("torchmetrics.image.fid", "generation")
    metric = metrics.FrechetInceptionDistance(feature=_Flat(features), normalize=False)
    return float(_filled(metric, real, generated).compute())


def kid(features: nn.Module, real: Tensor, generated: Tensor, seed: int = 0) -> float:
    """Unbiased squared MMD under the cubic kernel; lower is nearer, two halves of one set lie around 0."""
    metrics = need_extra("torchmetrics.image.kid", "generation")
    size = min(SUBSET, len(real), len(generated))
    subsets = SUBSETS if size < max(len(real), len(generated)) else 1  # all subsets of that size are the whole sets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features: as it must
        metric = metrics.KernelInceptionDistance(
            feature=_Flat(features), subsets=subsets, subset_size=size, normalize=False
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return float(_filled(metric, real, generated).compute()[0])


def _filled(metric: Any, real: Tensor, generated: Tensor) -> Any:
    for name, images in (("real", real), ("generated", generated)):
        if len(images) < 2:
            raise BadData(f"expected at least 2 {name} images to compare distributions, found {len(images)}; draw more")
        metric.update(images, real=name == "real")
    return metric


class _Flat(nn.Module):
    """The features, told apart from a name or number by being a module, with their count where torchmetrics looks for it."""

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features
        if hasattr(features, "num_features"):
            self.num_features = int(features.num_features)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


Distance = Callable[[nn.Module, Tensor, Tensor], float]


def halves(real: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two disjoint halves of the real images: what generated images are compared with, and what is compared in their place."""
    order = torch.randperm(len(real), generator=generator(seed, "real halves"))
    return real[order[: len(real) // 2]], real[order[len(real) // 2 :]]


def corrected(distance: Distance, features: nn.Module, real: Tensor, generated: Tensor) -> tuple[float, float]:
    """(distance less the floor, floor): generated images against one half of the real ones, less what as many images of the
    other half are apart from it. 0 means: as near as real images."""
    half, other = halves(real)
    floor = distance(features, half, other[: max(2, min(len(generated), len(other)))])
    return distance(features, half, generated) - floor, floor


def precision_recall(
    features: nn.Module, real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """(precision, recall) in [0, 1]: quality and diversity told apart."""
    r, g = features(real).double(), features(generated).double()
    for name, points in (("real", r), ("generated", g)):
        if len(points) <= neighbours:
            raise BadData(
                f"expected more than {neighbours} {name} images for their manifold, found {len(points)}; draw more"
            )
    return _within(g, r, neighbours), _within(r, g, neighbours)


def _within(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Share of points that lie in the ball of some point of the manifold, which reaches to its k-th neighbour."""
    radii = (
        torch.cdist(manifold, manifold).kthvalue(neighbours + 1, 1).values
    )  # the first neighbour is the point itself
    return float((torch.cdist(points, manifold) <= radii).any(1).double().mean())


def feature_distance(features: nn.Module, images: Tensor, others: Tensor) -> Tensor:
    """(N,) distance of each image to its partner."""
    return (features(images).double() - features(others).double()).norm(dim=1)


def clip_score(images: Tensor, prompts: list[str], clip: Any) -> float:
    """Mean of max(100 cos(image, text), 0): torchmetrics' scale (others write 2.5 cos, or the bare cosine, near 0.3).

    clip: a local folder of a CLIP model, or a function that returns (model, processor).
    """
    scores = need_extra("torchmetrics.multimodal.clip_score", "generation")
    model, processor = clip() if callable(clip) else _clip(clip)
    metric = scores.CLIPScore(lambda: (_Projected(model), processor))
    return float(metric(list(images), prompts))


class _Projected(nn.Module):
    """A CLIP model whose features are tensors: since transformers 5 they come inside an output, which torchmetrics does not open."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip, self.config = clip, clip.config

    def get_image_features(self, *inputs: Any) -> Tensor:
        return _opened(self.clip.get_image_features(*inputs))  # type: ignore[operator]

    def get_text_features(self, *inputs: Any) -> Tensor:
        return _opened(self.clip.get_text_features(*inputs))  # type: ignore[operator]


def _opened(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output


def _clip(folder: Any) -> tuple[Any, Any]:
    transformers = need_extra("transformers", "generation")
    try:
        return (
            transformers.CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True),
            transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True),
        )
    except (OSError, ValueError) as error:
        raise BadModel(
            f"expected a CLIP model's folder with config.json, *.safetensors and its processor, found none that can be read "
            f"({str(error).splitlines()[0]}); save model and processor with save_pretrained(folder); a pickle is never read"
        ) from error
