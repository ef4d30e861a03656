"""Tables for diffusion models: what the network denoises and what it is conditioned on, from images or from the model itself.

data = pictures(model, images, prompts=["a red three", ...], style=styles)      # images (N, C, H, W) in [-1, 1]
data = pictures(model, images, labels=labels)
data = imagined(model, ["a red three"], count=50)                               # no images at hand: the model's own
data = load_pictures("photos.parquet", model, image="image", prompt="caption")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.cases.data import Data, MapData, TensorData
from expunge.errors import BadData, nearest
from expunge.tasks.base import evaluating
from expunge.tasks.sampling import Sampling, sample


def pictures(
    model: Any,
    images: Tensor,
    *,
    labels: Tensor | Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    batch_size: int = 64,
    **columns: Any,
) -> TensorData:
    """A table of images with their conditions, encoded once by the model's autoencoder where it has one.

    Args:
        model: the `Denoiser` they are for.
        images: (N, C, H, W) in [-1, 1], of the size the pipeline draws; another size is resized (bilinear, antialiased).
        labels: (N,) class ids, for a class-conditional model; prompts: N texts, for a text-conditional one.
        columns: what a request may ask about (a style, an object, a group), one value per image.

    Raises: BadData for values outside [-1, 1], another number of channels, or conditions of the other kind.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise BadData(
            f"expected images as floats (N, C, H, W) in [-1, 1], found {images.dtype} of shape {tuple(images.shape)}; "
            "convert uint8 by x / 127.5 - 1"
        )
    low, high = (float(images.min()), float(images.max())) if images.numel() else (0.0, 0.0)
    if low < -1.001 or high > 1.001 or low != low:
        raise BadData(
            f"expected images in [-1, 1], found values from {low:.3g} to {high:.3g}; scale 0..255 by x / 127.5 - 1"
        )
    given = {"text": prompts, "class": labels}
    if given[model.kind] is None:
        found = next((f"{k} conditions" for k, v in given.items() if v is not None), "none")
        raise BadData(
            f"expected {'prompts' if model.kind == 'text' else 'labels'} for a {model.kind}-conditional model, found {found}; "
            "pass them beside the images"
        )
    if model.kind == "text":
        condition = {"input_ids": model.conditions.of(list(prompts or ()))}
    else:
        condition = {"labels": model.conditions.of(labels if labels is not None else [])}
    latents = torch.cat([_latents(model, part) for part in images.split(batch_size)])
    return TensorData(latents=latents, **condition, **columns)


def _latents(model: Any, images: Tensor) -> Tensor:
    channels, height, width = _drawn(model)
    if images.shape[1] != channels:
        raise BadData(
            f"expected images of {channels} channels, found {images.shape[1]}; convert them to what the pipeline draws"
        )
    if images.shape[2:] != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True).clamp(-1, 1)
    with evaluating(model):
        return model.latents(images.to(model.device)).cpu()


def _drawn(model: Any) -> tuple[int, int, int]:
    """(C, H, W) of the images that the pipeline draws."""
    channels, height, width = model.shape
    vae = getattr(model, "vae", None)
    if vae is None:
        return channels, height, width
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return int(vae.config.out_channels), height * factor, width * factor


def imagined(
    model: Any,
    conditions: Sequence[str] | Sequence[int],
    count: int = 20,
    sampling: Sampling | None = None,
    seed: int = 0,
    **columns: Any,
) -> TensorData:
    """A table of the model's own images, `count` for each prompt or class: forget or retain data where there is none.

    columns: one value per condition, repeated for its images. Samples with NaN are dropped (said in the error if none is left).
    """
    each = model.conditions.of(list(conditions))
    rows = each.repeat_interleave(count, 0)
    samples = sample(model, rows, sampling, seed)
    kept = samples.finite
    if not bool(kept.any()):
        raise BadData(
            f"expected images from the model, found NaN in all {len(samples)}; the model is damaged, or its dtype too small"
        )
    latents = torch.cat([_latents(model, part) for part in samples.images[kept].split(64)])
    name = "input_ids" if model.kind == "text" else "labels"
    repeated: dict[str, Any] = {k: torch.as_tensor(v).repeat_interleave(count, 0)[kept] for k, v in columns.items()}
    return TensorData(latents=latents, **{name: rows[kept]}, **repeated)


def load_pictures(
    path: str | os.PathLike[str],
    model: Any,
    *,
    image: str = "image",
    prompt: str = "caption",
    label: str = "label",
    split: str = "train",
) -> TensorData:
    """Images with captions or class numbers from a file or folder that `load_data` reads (parquet, an image folder, ...).

    image, prompt, label: column names. Other columns of numbers ride along, so that requests can ask about them."""
    from expunge.cases.loading import load_data

    table: Data = load_data(path, split=split)
    if isinstance(table, TensorData):
        rows: dict[str, Any] = {name: table.column(name) for name in table.names}
    else:
        assert isinstance(table, MapData)
        rows = {name: [table.dataset[i][name] for i in range(len(table))] for name in table.names}
    for ours, theirs in (("inputs", image), ("labels", label)):  # what load_data may have named by itself
        if ours in rows and theirs not in rows:
            rows[theirs] = rows.pop(ours)
    wanted = prompt if model.kind == "text" else label
    for name in (image, wanted):
        if name not in rows:
            raise BadData(
                f"expected a column '{name}', found {', '.join(rows)}.{nearest(name, rows)} Name it in data.columns"
            )
    channels, height, width = _drawn(model)
    found = rows.pop(image)
    tensor = (
        _scaled(found)
        if isinstance(found, Tensor)
        else torch.stack([_tensor(picture, channels, height, width) for picture in found])
    )
    condition = rows.pop(wanted)
    numbers: dict[str, Any] = {k: torch.as_tensor(v) for k, v in rows.items() if _numeric(v)}
    if model.kind == "text":
        return pictures(model, tensor, prompts=list(condition), **numbers)
    return pictures(model, tensor, labels=torch.as_tensor(condition), **numbers)


def _tensor(picture: Any, channels: int, height: int, width: int) -> Tensor:
    """A PIL picture as (C, H, W) in [-1, 1], cut to the middle and resized."""
    import numpy as np

    mode = "L" if channels == 1 else "RGB"
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert(mode).crop((left, top, left + side, top + side)).resize((width, height), 3)
    array = torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1)
    return array[None] if array.dim() == 2 else array.permute(2, 0, 1)


def _scaled(images: Tensor) -> Tensor:
    """A table's own images in [-1, 1]: bytes from 0..255, floats from 0..1 or as they are."""
    if not images.is_floating_point():
        return images.float() / 127.5 - 1
    return images if float(images.min()) < 0 else images * 2 - 1 if float(images.max()) <= 1 else images


def _numeric(values: Any) -> bool:
    if isinstance(values, Tensor):
        return values.dim() == 1
    return bool(values) and isinstance(values[0], (int, float, bool))
