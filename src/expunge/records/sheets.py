"""Contact sheets: images of several models under the same noise, one row per prompt, as a PNG with its words."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expunge.errors import need_extra
from expunge.files import write_atomic

LEAST, GAP, HEAD = 48, 6, 22
"""Pixels: of an image's side at least (small ones grow by whole factors), between models, of the line of names."""


@dataclass(frozen=True)
class Sheet:
    """rows: prompts. columns: model -> (rows, images of a prompt, C, H, W) uint8, C 1 or 3."""

    title: str
    rows: tuple[str, ...]
    columns: Mapping[str, Tensor]


def write_sheet(path: str | Path, sheet: Sheet) -> Path:
    """The PNG, in one step."""
    pillow, drawing = need_extra("PIL.Image", "generation"), need_extra("PIL.ImageDraw", "generation")
    font = need_extra("PIL.ImageFont", "generation").load_default(13)
    first = next(iter(sheet.columns.values()))
    each, size = first.shape[1], first.shape[-1]
    factor = max(1, -(-LEAST // size))
    side = size * factor
    left = 12 + int(max((font.getlength(row) for row in sheet.rows), default=0))
    wide = max(each * (side + 1), 2 + int(max(font.getlength(name) for name in sheet.columns)))
    page = pillow.new(
        "RGB", (left + len(sheet.columns) * (wide + GAP), HEAD + len(sheet.rows) * (side + 1) + GAP), "white"
    )
    pen = drawing.Draw(page)
    for number, row in enumerate(sheet.rows):
        pen.text((6, HEAD + number * (side + 1) + side // 2 - 8), row, "black", font=font)
    for place, (name, images) in enumerate(sheet.columns.items()):
        x = left + place * (wide + GAP)
        pen.text((x, 3), name, "black", font=font)
        for r, row_images in enumerate(images):
            for c, image in enumerate(row_images):
                picture = pillow.fromarray(_rgb(image).numpy()).resize((side, side), 0)
                page.paste(picture, (x + c * (side + 1), HEAD + r * (side + 1)))
    held = io.BytesIO()
    page.save(held, "PNG", optimize=True)
    return write_atomic(Path(path), held.getvalue())


def _rgb(image: Tensor) -> Tensor:
    """(H, W, 3) uint8 of (C, H, W)."""
    return image.expand(3, -1, -1).permute(1, 2, 0).contiguous().to(torch.uint8)
