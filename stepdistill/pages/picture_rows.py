"""Rows of pictures on a page: labelled in text, aligned, and in one box that scrolls where the screen is narrow."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from textwrap import shorten

from PIL import Image

from stepdistill.pages.html import embedded_picture, scrolled
from stepdistill.pages.sheets import Sheet

GAP = 2
STYLE = (
    ".rows{width:max-content}.rows figure{margin:0 0 .5em}.rows img{display:block;max-width:none}"
    ".rows figcaption,.rows ol{font-size:13px}.rows figcaption{position:sticky;left:0;width:max-content}"
    ".rows ol{list-style:none;margin:0;padding:0;display:flex;color:var(--muted);line-height:1.25;font-size:12px}"
    ".pixels img{image-rendering:pixelated}"
)


def picture_rows(sheet: Sheet, *, name: str, width: int = 64, columns: int = 16) -> str:
    """The rows of a sheet as HTML.

    Args:
        sheet: what is shown.
        name: what screen readers call it.
        width: of a picture, CSS pixels; larger ones are reduced to twice that.
        columns: how many pictures of a row are shown.
    """
    prompts = sheet.prompts[:columns]
    said = f": {', '.join(prompts)}" if prompts else ""
    parts = [
        f"<figure><figcaption>{html.escape(row.label)}</figcaption>"
        f"{_strip(row.pictures[:columns], f'{row.label}{said}', width)}</figure>"
        for row in sheet.rows
    ]
    if prompts:
        style = f"width:{width}px;margin-right:{GAP}px"
        items = "".join(
            f'<li style="{style}" title="{html.escape(text)}">{html.escape(shorten(text, 34, placeholder=" ..."))}</li>'
            for text in prompts
        )
        parts.append(f"<ol aria-label=prompts>{items}</ol>")
    kind = "rows pixels" if sheet.rows and sheet.rows[0].pictures[0].width <= 2 * width else "rows"
    return scrolled(f'<div class="{kind}">{"".join(parts)}</div>', name)


def _strip(pictures: Sequence[Image.Image], alt: str, width: int) -> str:
    """Pictures beside each other, as one."""
    own_width, own_height = pictures[0].size
    factor = max(1, round(own_width / width)) if own_width <= 2 * width else 2
    height = round(width * own_height / own_width)
    size = (factor * width, factor * height)
    whole = Image.new("RGBA", (len(pictures) * factor * (width + GAP), size[1]))
    resample = Image.Resampling.NEAREST if own_width <= width else Image.Resampling.LANCZOS
    for place, picture in enumerate(pictures):
        small = picture if picture.size == size else picture.resize(size, resample)
        whole.paste(small, (place * factor * (width + GAP), 0))
    file = io.BytesIO()
    if own_width <= 2 * width:
        whole.save(file, "PNG")
        kind = "png"
    else:
        ground = Image.new("RGB", whole.size, "white")
        ground.paste(whole, mask=whole)
        ground.save(file, "JPEG", quality=85)
        kind = "jpeg"
    shown = f'width="{len(pictures) * (width + GAP)}" height="{height}"'
    return embedded_picture(file.getvalue(), alt, attributes=shown, kind=kind)
