"""Pictures laid out: labelled rows, which a page takes apart again, and a near-square grid."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from stepdistill.system.parsing import parse_json

if TYPE_CHECKING:
    from torch import Tensor


LABEL, GAP = 16, 2
"""Height of a row's label, and pixels between pictures."""
_KEY = "stepdistill rows"


@dataclass(frozen=True)
class Row:
    """A row of a sheet.

    Attributes:
        label: what it is.
        pictures: one a prompt, all of one size.
    """

    label: str
    pictures: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Sheet:
    """Labelled rows of pictures.

    Attributes:
        rows: from the top down.
        prompts: what each column shows; empty where it is not known.
    """

    rows: tuple[Row, ...]
    prompts: tuple[str, ...] = ()


def png_of_rows(rows: Sequence[tuple[str, Tensor]], prompts: Sequence[str] = (), tile: int = 64) -> bytes:
    """PNG of :func:`rows_of_pictures` that says what its rows and columns are, for :func:`read_sheet`."""
    image = rows_of_pictures(rows, tile)
    height = (image.height - GAP) // len(rows) - LABEL - GAP
    _, _, own_height, own_width = rows[0][1].shape
    about = {
        "rows": [[label, len(pictures)] for label, pictures in rows],
        "size": [own_width * height // own_height, height],
        "prompts": list(prompts),
    }
    notes, file = PngInfo(), io.BytesIO()
    notes.add_itxt(_KEY, json.dumps(about, ensure_ascii=False))
    image.save(file, "PNG", pnginfo=notes)
    return file.getvalue()


def read_sheet(data: bytes) -> Sheet | None:
    """The rows of such a PNG; None where it is none, or damaged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            about = parse_json(image.info[_KEY])
            width, height = about["size"]
            rows, most = [], min(map(int, (width, height, *(count for _, count in about["rows"]))))
            columns = max(count for _, count in about["rows"])
            size = columns * (width + GAP) + GAP, len(about["rows"]) * (height + LABEL + GAP) + GAP
            if most < 1 or size != image.size:
                return None
            for r, (label, count) in enumerate(about["rows"]):
                top = r * (LABEL + height + GAP) + LABEL
                places = [GAP + c * (width + GAP) for c in range(count)]
                pictures = tuple(image.crop((x, top, x + width, top + height)) for x in places)
                rows.append(Row(str(label), pictures))
            return Sheet(tuple(rows), tuple(map(str, about["prompts"])))
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        SyntaxError,  # of a broken PNG
    ):
        return None


def rows_of_pictures(rows: Sequence[tuple[str, Tensor]], tile: int = 64) -> Image.Image:
    """Rows of images uint8 [B, 3, H, W], each under its label; small ones grow by a whole factor to about ``tile``."""
    label_height, gap = LABEL, GAP
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
