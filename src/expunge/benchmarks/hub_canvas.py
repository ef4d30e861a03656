"""UnlearnCanvas's public files: the data set's folders, a pipeline fine-tuned on it, and two image classifiers as judges.

    <data>/<style>/<object>/<number>.jpg          60 styles (and Seed_Images, the photos) x 20 objects x 20 images
    <judges>/style, <judges>/object               image classifiers as transformers saves them (ViT-L/16 in the paper)
    "A {object} image in {style with spaces} style."

Images 1 to 5 of a cell are the reference (FID, and what judges are tried on), as in the paper; the others are data. A judge's
classes are found by their names, spaces and underscores alike. Features of FID and KID are the object judge's penultimate layer,
which is said beside the numbers: the paper's are torchvision's Inception, so FIDs compare within a run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.metrics.judges import Judge, Reject, to_uint8
from expunge.benchmarks.canvas import Canvas
from expunge.benchmarks.unlearncanvas import Bench
from expunge.cases.loading import load_model
from expunge.cases.pictures import _drawn, _tensor
from expunge.errors import BadData, BadModel, BadSetting, nearest, need_extra
from expunge.files import digest_file
from expunge.tasks.sampling import Sampling

REFERENCE = 5
"""The first images of a cell, which no model learns from."""
SAMPLING = Sampling(100, 9.0, scheduler="ddim")
SEEDS = (188, 288, 588, 688, 888)
CAPTION = "A {object} image in {style} style."
PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class HubCanvas(Canvas):
    """MiniCanvas's questions over the public folders: one word per style."""

    def caption(self, style: int, object: int, word: int = 0) -> str:
        return CAPTION.format(style=self.style_names[style].replace("_", " "), object=self.object_names[object])

    def domain(self, target: str) -> tuple[str, int]:
        for domain, names in (("style", self.style_names), ("object", self.object_names)):
            if target in names:
                return domain, names.index(target)
        known = [*self.style_names, *self.object_names]
        raise BadSetting(f"expected a style or object of {', '.join(known)}, found '{target}'.{nearest(target, known)}")


def read_canvas(
    folder: Path, shape: tuple[int, int, int], split: str = "train", per_cell: int | None = None
) -> HubCanvas:
    """The images of style/object/number.jpg, cut square and resized to (C, H, W), in [-1, 1]. split: "test" is each cell's first
    five by number, "train" the rest. per_cell: at most so many of a cell."""
    pillow = need_extra("PIL.Image", "generation")
    folder = Path(folder)
    styles = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    objects = sorted({p.name for style in styles for p in (folder / style).iterdir() if p.is_dir()})
    images, style_of, object_of = [], [], []
    for s, style in enumerate(styles):
        for o, name in enumerate(objects):
            cell = [f for f in (folder / style / name).glob("*") if f.suffix.lower() in PICTURES]
            files = sorted(cell, key=lambda file: (len(file.stem), file.stem))  # 2 before 10
            for file in (files[:REFERENCE] if split == "test" else files[REFERENCE:])[:per_cell]:
                with pillow.open(file) as opened:
                    images.append(_tensor(opened, *shape))
                style_of.append(s)
                object_of.append(o)
    if not images:
        raise BadData(
            f"expected images as style/object/number.jpg in {folder.name}, more than {REFERENCE} in each cell, found none; give the "
            "data set's own folder"
        )
    return HubCanvas(
        torch.stack(images), torch.tensor(style_of), torch.tensor(object_of), tuple(objects), tuple(styles)
    )


class Classifier(nn.Module):
    """An image classifier from a folder of transformers; `features` are what its last linear layer reads."""

    def __init__(self, folder: Path):
        super().__init__()
        self.net: Any = load_model(str(folder)).eval()
        self.names = tuple(self.net.config.id2label[i].replace(" ", "_") for i in range(self.net.config.num_labels))
        self.size = int(self.net.config.image_size)
        last = [m for m in self.net.modules() if isinstance(m, nn.Linear)][-1]
        self.num_features, self._read = last.in_features, last
        self.digest = digest_file(next(iter(sorted(Path(folder).glob("*.safetensors")))))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, K) of uint8 images: resized, mean and deviation 0.5, as the paper's judges."""
        found = []
        for part in images.split(64):
            floats = to_uint8(part).float() / 127.5 - 1
            found.append(self.net(pixel_values=nn.functional.interpolate(
                floats.expand(-1, 3, -1, -1), (self.size, self.size), mode="bilinear", antialias=True)).logits)  # fmt: skip
        return torch.cat(found)

    def forward(self, images: Tensor) -> Tensor:
        """(N, d) features."""
        caught: list[Tensor] = []
        hook = self._read.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach().float()))
        try:
            self.logits(images)
        finally:
            hook.remove()
        return torch.cat(caught)


@dataclass(frozen=True)
class FolderJudges:
    """judges in the order of domains. reference: target -> real images that do not show it."""

    judges: tuple[Judge, ...]
    features: Any
    feature_name: str
    canvas: Any = field(repr=False)

    def reference(self, target: Mapping[str, str]) -> Tensor:
        keep = torch.ones(len(self.canvas), dtype=torch.bool)
        for domain, name in target.items():
            own, names = _column(self.canvas, domain)
            keep &= own == (names.index(name) if name in names else -1)
        return to_uint8(self.canvas.images[~keep])


def _column(canvas: Canvas, domain: str) -> tuple[Tensor, tuple[str, ...]]:
    return (canvas.styles, canvas.style_names) if domain == "style" else (canvas.objects, canvas.object_names)


def folder_judges(folders: Mapping[str, Path], held_out: Path, size: int = 224) -> FolderJudges:
    """Judges from folders, tried on real images <style>/<object>/<number>.jpg: each cell's first five, which they never saw."""
    canvas = read_canvas(held_out, (3, size, size), "test")
    return judged_by({domain: Classifier(folder) for domain, folder in folders.items()}, canvas)


def judged_by(nets: Mapping[str, Classifier], canvas: Canvas) -> FolderJudges:
    """Accuracy of each on the held-out images; the reject test of one works on the features of another, where there is one."""
    found = []
    for domain, net in nets.items():
        own, names = _column(canvas, domain)
        missing = [name for name in names if name not in net.names]
        if missing:
            raise BadModel(
                f"expected the {domain} judge to know {', '.join(names)}, found no {', '.join(missing)} among its "
                f"{len(net.names)} classes; give the judge of this data set"
            )
        place = torch.tensor([net.names.index(name) for name in names])
        probabilities: Callable[[Tensor], Tensor] = lambda images, net=net: net.logits(images).softmax(1).cpu()  # noqa: E731
        bytes_ = to_uint8(canvas.images)
        says = probabilities(bytes_).argmax(1)
        other: Any = next((n for d, n in nets.items() if d != domain), net)
        # every second image is what is known, the others say how far unseen real images lie from it
        first = torch.zeros(len(canvas), dtype=torch.bool)
        first[::2] = True
        reject = Reject.fitted(other, bytes_[first], bytes_[~first])
        accuracy = float((says == place[own]).float().mean())
        found.append(Judge(domain, net.names, probabilities, reject, accuracy, len(canvas), net.digest))
    features: Any = nets.get("object", next(iter(nets.values())))
    return FolderJudges(tuple(found), features, f"the judge's penultimate layer, {features.num_features}-d", canvas)


def from_folders(
    model: str | Path,
    data: Path | None,
    judges: Path | None,
    retrained: str | Path | None = None,
    second: str | Path | None = None,
    per_cell: int = 2,
    sampling: Sampling = SAMPLING,
    seeds: Sequence[int] = SEEDS,
) -> Bench:
    """The benchmark's pieces from local folders. per_cell: training images of a cell that methods are given. retrained: models
    without one target ({target} in the path stands for its name)."""
    if data is None or judges is None:
        raise BadSetting(
            "expected --data (style/object/number.jpg) and --judges (folders style and object) beside --model, found "
            f"{'no judges' if data else 'no data'}; give both, or leave --model out for the embedded model"
        )
    denoiser: Any = load_model(model)
    shape = _drawn(denoiser)
    train, test = read_canvas(data, shape, "train", per_cell), read_canvas(data, shape, "test")
    found = judged_by({name: Classifier(Path(judges) / name) for name in ("style", "object")}, test)

    def gold(seed: int, target: str) -> Any:
        place = retrained if seed % 2 == 0 else second or retrained
        return None if place is None else load_model(str(place).replace("{target}", target.replace(" ", "_")))

    return Bench(
        lambda seed: denoiser, gold, train, test, found.judges, found.features, found.feature_name, sampling, tuple(seeds),
        words={name: (name,) for name in train.style_names},
    )  # fmt: skip
