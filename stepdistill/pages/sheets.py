"""Pictures laid out: labelled rows, and a near-square grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from torch import Tensor


def rows_of_pictures(rows: Sequence[tuple[str, Tensor]], tile: int = 64) -> Image.Image:
    """Rows of images uint8 [B, 3, H, W], each under its label; small ones grow by a whole factor to about ``tile``."""
    label_height, gap = 16, 2
    _, _, height, width = rows[0][1].shape
    factor = max(1, tile // max(height, width))
    height, width = height * factor, width * factor
    columns = max(len(images) for _, images in rows)
    size = (columns * (width + gap) + gap, len(rows) * (height + label_height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for r, (label, images) in enumerate(rows):
        top = r * (height + label_height + gap)
        pen.text((gap, top + 2), label, fill="black")
        for c, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
                (width, height), Image.Resampling.NEAREST
            )
            sheet.paste(picture, (gap + c * (width + gap), top + label_height))
    return sheet


def grid(images: Sequence[Image.Image], *, tile: int = 128, gap: int = 4) -> Image.Image:
    """Images on a near-square white grid, row by row; small ones grow by a whole factor, up to ``tile`` pixels."""
    factor = max(1, tile // max(images[0].size))
    width, height = (side * factor for side in images[0].size)
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        big = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(big, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
