"""The notebook as a page of the site: its text and its code, without outputs."""

from __future__ import annotations

import json
from pathlib import Path


def page(file: Path) -> str:
    """Markdown of a notebook's cells."""
    cells = json.loads(file.read_text("utf-8"))["cells"]
    texts = []
    for cell in cells:
        source = "".join(cell["source"]).strip()
        texts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    texts.insert(1, f"Download: [{file.name}](../{file.name}).")
    return "\n\n".join(texts) + "\n"
