"""Parts of the pages that a run, a comparison and an evaluation write: one file each, which fetches nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from stepdistill.pages.style import STYLE


def document(title: str, style: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        style: CSS rules after those of STYLE.
        body: HTML.
    """
    return (
        f'<!doctype html><html lang=en><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}{style}</style><body><main>{''.join(body)}</main></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of plain texts in a box of its own that scrolls where it is wider than the screen.

    Args:
        head: its first row; empty for none.
        rows: the others.
        kind: its class in the style sheet; ``numbers`` sets all columns but the first to the right.
    """
    lines = [_line("th scope=col", head)] if head else []
    lines += [_line("td", row) for row in rows]
    return scrolled(f'<table class="{kind}">{"".join(lines)}</table>', "table")


def scrolled(inner: str, name: str) -> str:
    """HTML in a box of its own that scrolls sideways, by the keyboard too.

    Args:
        inner: HTML.
        name: what screen readers call the box, plain text.
    """
    return f'<div class=scroll tabindex=0 role=region aria-label="{html.escape(name)}">{inner}</div>'


def _line(kind: str, cells: Sequence[str]) -> str:
    end = kind.partition(" ")[0]
    return f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{end}>' for cell in cells)}</tr>"


def embedded_picture(data: bytes, alt: str, *, attributes: str = "", kind: str = "png") -> str:
    """An ``<img>`` that holds its file.

    Args:
        data: the file.
        alt: plain text in its place.
        attributes: further ones, as HTML.
        kind: ``png``, ``jpeg`` or ``webp``.
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
