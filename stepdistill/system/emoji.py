"""What ships inside the package: teachers, the evaluation network, and the real images with their captions.

``assets/NAME/teacher`` is the diffusers folder of the teacher NAME. That of ``emoji-flow`` holds what is its own, the
transformer and every config; VAE, tokenizer and text encoders are those of ``emoji`` and its feature network, put
beside them in the user's cache at first use. Nothing here imports torch at start.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.errors import UserError
from stepdistill.system.files import give_usual_modes
from stepdistill.system.shipped import cache_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_ASSETS = Path(__file__).parents[1] / "assets"
_TILE = 32  # pixels
_TILES_A_ROW = 64


def embedded_teachers() -> dict[str, Path]:
    """The teachers this installation carries: name -> what is shipped of its folder."""
    return {index.parts[-3]: index.parent for index in sorted(_ASSETS.glob("*/teacher/model_index.json"))}


def teacher_folder(name: str) -> Path | None:
    """The whole diffusers folder of an embedded teacher, or None where no teacher of that name is embedded.

    Raises:
        UserError: the user's cache cannot be written to.
    """
    shipped = embedded_teachers().get(name)
    if shipped is None:
        return None
    return shipped if (shipped / "tokenizer").is_dir() else _completed(name, shipped)


def _completed(name: str, shipped: Path) -> Path:
    """The shipped folder with the parts it shares, in the user's cache."""
    folder = cache_folder() / "embedded" / f"{name}-{_content_hash(shipped)}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        shutil.copytree(shipped, partial, dirs_exist_ok=True)
        _share(partial)
        try:
            give_usual_modes(partial)
            partial.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(partial)
            if not folder.is_dir():
                raise
    except OSError as error:
        raise UserError(
            f"the embedded teacher {name} is put together in {folder.parent}, which failed ({error}): set "
            "STEPDISTILL_CACHE to a folder that can be written to"
        ) from error
    return folder


def _share(folder: Path) -> None:
    """Adds what the flow teacher takes from ``emoji``: VAE, tokenizers, CLIP's text tower, and a T5 of zeros."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    base = _ASSETS / "emoji"
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copy(base / "teacher" / "vae" / weights, folder / "vae" / weights)
    for component in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(tokenizer_folder(), folder / component)
    clip = load_file(features_folder() / "model.safetensors")
    tower = {key: value for key, value in clip.items() if key.startswith(("text_model.", "text_projection."))}
    for component in ("text_encoder", "text_encoder_2"):
        save_file(tower, folder / component / "model.safetensors", {"format": "pt"})
    shapes = json.loads((folder / "text_encoder_3" / "zeros.json").read_text())
    zeros = {key: np.zeros(shape, np.float16) for key, shape in shapes.items()}
    save_file(zeros, folder / "text_encoder_3" / "model.safetensors", {"format": "pt"})


def _content_hash(shipped: Path) -> str:
    """Of all files that the folder is put together from: another version of the package makes another folder."""
    digest = hashlib.sha256()
    for root in (shipped, _ASSETS / "emoji" / "teacher" / "vae", tokenizer_folder(), features_folder()):
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def features_folder() -> Path:
    """The CLIPModel folder of the evaluation network behind FD-emoji and CLIP-emoji."""
    return _ASSETS / "emoji" / "features"


def judge_folder() -> Path:
    """The judge: the network behind FD-judge and judge fit, which nothing learns from unless a recipe says so."""
    return _ASSETS / "emoji" / "judge"


def tokenizer_folder() -> Path:
    """The tokenizer of the embedded captions: the emoji teacher's and the evaluation network's."""
    return _ASSETS / "emoji" / "teacher" / "tokenizer"


def emoji_captions() -> list[str]:
    """The 3,781 captions, in the order of :func:`emoji_images`."""
    return _captions_file()["captions"]


def emoji_groups() -> list[str]:
    """The Unicode group of each caption, in the same order; 9 are different."""
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
