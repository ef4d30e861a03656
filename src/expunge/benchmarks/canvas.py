"""MiniCanvas: real images in exact styles, so that for every caption it is known what the image must show.

    canvas = mini_canvas("train")          # 1,347 digits x 4 styles, images (5388, 3, 8, 8) in [-1, 1]
    canvas.caption(style=2, object=3)       # "a red three"; word=1: "a crimson three"
    canvas.without("red")                  # neither images nor captions of red (nor of crimson): for `retrained`
    images, labels = digit_images("train") # (1347, 1, 8, 8): the class toy's data

After UnlearnCanvas (arXiv 2402.11846), whose images too are stylised by a filter: every image exists in every style. Each
style has two words, so that erasing one leaves a second route to the concept, which leak and attack audits can measure.

    python -m expunge.benchmarks.canvas train --toy class --seed 0 [--exclude 3] [--flow]
    python -m expunge.benchmarks.canvas train --toy text --seed 0 [--exclude red] [--size 32 --objects cifar10]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.errors import BadSetting, nearest
from expunge.seeds import generator

STYLES = {
    "plain": ("plain", "normal"), "inverted": ("inverted", "negative"), "red": ("red", "crimson"),
    "stripes": ("stripes", "striped"),
}  # fmt: skip
OBJECTS = {
    "digits": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
CAPTION = "a {style} {object}"
TRAIN_SHARE = 0.75


def styled(images: Tensor, style: str) -> Tensor:
    """(N, 1 or 3, S, S) in [-1, 1] -> (N, 3, S, S) in this style.

    inverted: -x. red: the brightest channel in red, the others black. stripes: rows of an eighth of the height alternate
    between x and (x + 1) / 2, so that black turns grey there. All but red of a coloured image can be undone (`unstyled`).
    """
    images = images.expand(-1, 3, -1, -1)
    if style == "plain":
        return images.clone()
    if style == "inverted":
        return -images
    if style == "red":
        red = images.max(1, keepdim=True).values
        return torch.cat([red, torch.full_like(red, -1).expand(-1, 2, -1, -1)], 1)
    if style == "stripes":
        return torch.where(_striped(images.shape[-2]), (images + 1) / 2, images)
    raise BadSetting(f"expected a style of {', '.join(STYLES)}, found '{style}'.{nearest(style, STYLES)}")


def unstyled(images: Tensor, style: str) -> Tensor:
    """The plain (N, 3, S, S) image of a styled one; of a coloured image's red style only the brightness is left."""
    if style == "red":
        return images[:, :1].expand(-1, 3, -1, -1).clone()
    if style == "stripes":
        return torch.where(_striped(images.shape[-2]), 2 * images - 1, images)
    return styled(images, style)


def _striped(size: int) -> Tensor:
    """(S, 1) True on the bright rows."""
    return (torch.arange(size) // max(1, size // 8) % 2 == 1)[:, None]


@dataclass(frozen=True)
class Canvas:
    """images (N, 3, S, S) float32 in [-1, 1]; styles and objects (N,) int64 index style_names and object_names.

    removed: the style or object, by its first word, that was left out; its index then occurs in no row.
    """

    images: Tensor
    styles: Tensor
    objects: Tensor
    object_names: tuple[str, ...]
    style_names: tuple[str, ...] = tuple(STYLES)
    removed: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def caption(self, style: int, object: int, word: int = 0) -> str:
        """word: which of the style's two words."""
        return CAPTION.format(style=STYLES[self.style_names[style]][word], object=self.object_names[object])

    def cells(self) -> list[tuple[int, int]]:
        """(style, object) of all cells that have images, in order."""
        return sorted(set(zip(self.styles.tolist(), self.objects.tolist(), strict=True)))

    def captions(self) -> list[str]:
        """Every caption of every cell: two words per style."""
        return [self.caption(style, object, word) for style, object in self.cells() for word in (0, 1)]

    def domain(self, target: str) -> tuple[str, int]:
        """("style" or "object", index) of a word; both words of a style mean the same index."""
        for index, name in enumerate(self.style_names):
            if target in STYLES[name]:
                return "style", index
        if target in self.object_names:
            return "object", self.object_names.index(target)
        known = [word for words in STYLES.values() for word in words] + list(self.object_names)
        raise BadSetting(f"expected a style or object of {', '.join(known)}, found '{target}'.{nearest(target, known)}")

    def without(self, target: str) -> Canvas:
        """The rows that do not show `target` (a word of a style, or an object): what `retrained` learns from."""
        domain, index = self.domain(target)
        keep = (self.styles if domain == "style" else self.objects) != index
        name = self.style_names[index] if domain == "style" else target
        return replace(
            self, images=self.images[keep], styles=self.styles[keep], objects=self.objects[keep], removed=name
        )

    def of(self, style: int | None = None, object: int | None = None) -> Tensor:
        """(M, 3, S, S) images of a style, an object, or a cell."""
        keep = torch.ones(len(self), dtype=torch.bool)
        keep = keep if style is None else keep & (self.styles == style)
        keep = keep if object is None else keep & (self.objects == object)
        return self.images[keep]


@cache
def mini_canvas(split: str = "train", size: int = 8, objects: str = "digits", rows: int | None = None) -> Canvas:
    """All images of a split in all styles. split: "train" or "test"; an image's styles lie on the same side.

    objects: "digits" (scikit-learn's 1,797, cut 75/25) or "cifar10" (its own 50,000/10,000). rows: the first ones alone.
    """
    images, labels = pictures(split, size, objects, rows)
    return Canvas(
        torch.cat([styled(images, style) for style in STYLES]), torch.arange(len(STYLES)).repeat_interleave(len(images)),
        labels.repeat(len(STYLES)), OBJECTS[objects],
    )  # fmt: skip


@cache
def pictures(
    split: str = "train", size: int = 8, objects: str = "digits", rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """(N, C, size, size) float32 in [-1, 1] and labels (N,): plain images, C = 1 for digits and 3 for CIFAR-10.

    Digits are k / 8 - 1 for k = 0..16; other sizes are resized, bilinearly up and by area down.
    """
    if split not in ("train", "test"):
        raise BadSetting(f"expected the split train or test, found '{split}'")
    if objects not in OBJECTS:
        raise BadSetting(f"expected objects of {', '.join(OBJECTS)}, found '{objects}'.{nearest(objects, OBJECTS)}")
    if objects == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = torch.randperm(len(x), generator=generator(0, "canvas"))
        cut = int(TRAIN_SHARE * len(order))
        order = order[:cut] if split == "train" else order[cut:]
        images, labels = torch.tensor(x / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)[order], torch.tensor(y)[order]
    else:
        from expunge.cases.datasets import cifar10

        wanted = {"train": 1, "test": 1, split: rows}
        table = getattr(cifar10(normalise=False, **wanted), split)
        images, labels = table.column("inputs").float() / 127.5 - 1, table.column("labels")
    images, labels = images[:rows], labels[:rows]
    if size > images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    elif size < images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="area")
    return images, labels.long()


def digit_images(split: str = "train", size: int = 8, exclude: int | None = None) -> tuple[Tensor, Tensor]:
    """The class toy's data: (N, 1, size, size) in [-1, 1] and digits (N,); exclude: one digit left out."""
    images, labels = pictures(split, size)
    keep = torch.ones_like(labels, dtype=torch.bool) if exclude is None else labels != exclude
    return images[keep], labels[keep]


if __name__ == "__main__":
    from expunge.benchmarks.image_models import main

    main()
