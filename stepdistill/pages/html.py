"""Parts of the pages that a run, a comparison and an evaluation write: one file each, which fetches nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2em auto;max-width:1150px;padding:0 1em}"
    "table{border-collapse:collapse;font-size:14px}td,th{padding:.3em .6em;border-bottom:1px solid #ccc}"
    "img{max-width:100%}code{font-size:13px}pre{background:#f4f4f4;padding:1em;overflow:auto}"
)


def document(title: str, style: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        style: CSS rules after those of STYLE.
        body: HTML.
    """
    return (
        f'<!doctype html><html lang=en><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}{style}</style>{''.join(body)}</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts; without a first row where ``head`` is empty."""
    lines = [("th", head)] if head else []
    lines += [("td", row) for row in rows]
    return f"<table>{''.join(_line(kind, row) for kind, row in lines)}</table>"


def _line(kind: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"


def embedded_picture(data: bytes, alt: str, *, attributes: str = "", kind: str = "png") -> str:
    """An ``<img>`` that holds its file.

    Args:
        data: the file.
        alt: plain text in its place.
        attributes: further ones, as HTML.
        kind: ``png`` or ``jpeg``.
    """
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img alt="{html.escape(alt)}" {attributes} src="{source}">'


def tile(image: Image.Image, alt: str, width: int) -> str:
    """A picture ``width`` CSS pixels wide: small ones as they are, larger ones reduced to twice that (JPEG)."""
    file = io.BytesIO()
    smaller = image.convert("RGB")
    kind = "png" if smaller.width <= 2 * width else "jpeg"
    if kind == "jpeg":
        height = max(1, round(2 * width * smaller.height / smaller.width))
        smaller = smaller.resize((2 * width, height), Image.Resampling.LANCZOS)
    smaller.save(file, kind, **({"quality": 88} if kind == "jpeg" else {"optimize": True}))
    return embedded_picture(file.getvalue(), alt, attributes=f'style="width:{width}px"', kind=kind)
