"""What ships inside the package: teachers, the evaluation network, and the real images with their captions.

``assets/NAME/teacher`` is the diffusers folder of the teacher NAME. Nothing here imports torch at start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ASSETS = Path(__file__).parent / "assets"
_TILE = 32  # pixels
_TILES_A_ROW = 64


def embedded_teachers() -> dict[str, Path]:
    """The teachers this installation carries: name -> diffusers folder."""
    return {index.parts[-3]: index.parent for index in sorted(_ASSETS.glob("*/teacher/model_index.json"))}


def teacher_folder(name: str) -> Path | None:
    """The diffusers folder of an embedded teacher, or None where no teacher of that name is embedded."""
    return embedded_teachers().get(name)


def features_folder() -> Path:
    """The CLIPModel folder of the evaluation network behind FD-emoji and CLIP-emoji."""
    return _ASSETS / "emoji" / "features"


def tokenizer_folder() -> Path:
    """The tokenizer of the embedded captions: the emoji teacher's and the evaluation network's."""
    return _ASSETS / "emoji" / "teacher" / "tokenizer"


def emoji_captions() -> list[str]:
    """The 3,781 captions, in the order of :func:`emoji_images`."""
    return _captions_file()["captions"]


def emoji_categories() -> list[str]:
    """The Unicode group of each of the 3,781 emoji, in the order of :func:`emoji_images`."""
    return _captions_file()["categories"]


def emoji_images() -> NDArray[np.uint8]:
    """The real images, uint8 [3781, 32, 32, 3] in RGB, white background (Noto Emoji, Apache License 2.0)."""
    import numpy as np
    from PIL import Image

    with Image.open(_ASSETS / "emoji" / "data" / "noto_32.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))  # [rows * 32, 64 * 32, 3]
    tiles = (
        pixels.reshape(-1, _TILE, _TILES_A_ROW, _TILE, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(-1, _TILE, _TILE, 3)
    )
    return np.ascontiguousarray(tiles[: len(emoji_captions())])  # the last row of the sheet is padded


def _captions_file() -> dict[str, list[str]]:
    content: dict[str, list[str]] = json.loads(
        (_ASSETS / "emoji" / "data" / "captions.json").read_text("utf-8")
    )
    return content
