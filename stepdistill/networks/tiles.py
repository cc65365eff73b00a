"""Decoding in parts: tiles of large pictures and videos, or one sample after the other. A VAE's folder does not say so,
so a student's manifest does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.networks.own_call import VERIFICATION
from stepdistill.system.parsing import parse_json

SWITCHES = {"use_tiling": "enable_tiling", "use_slicing": "enable_slicing"}
"""Attributes of diffusers' VAEs, and the methods that set them."""
SIZES = ("tile_", "use_framewise_", "num_latent_frames_", "num_sample_frames_")
"""How the attributes begin that say how large tiles are and how far they overlap, of frames, too."""
KEY = "vae"
"""Of a student's manifest."""


def tiles_of(vae: Any) -> dict[str, Any]:
    """What of these attributes is otherwise than in the VAE as its folder loads."""
    import torch

    if not hasattr(vae, "use_tiling"):
        return {}
    own = _known(vars(vae))
    try:
        with torch.device("meta"):
            loaded = vars(type(vae).from_config(vae.config))
    except (AttributeError, RuntimeError, TypeError, ValueError):  # it cannot be made without weights
        return own if any(own.get(switch) for switch in SWITCHES) else {}
    return {name: value for name, value in own.items() if loaded.get(name) != value}


def tiles_in(folder: Path) -> dict[str, Any]:
    """What the manifest of a student's folder says of them; none in a folder without one."""
    file = folder / VERIFICATION / "manifest.json"
    try:
        said = parse_json(file.read_text("utf-8")).get(KEY) if file.is_file() else None
    except (OSError, ValueError, AttributeError):
        return {}  # verify says what is wrong with it
    return _known(said) if isinstance(said, dict) else {}


def set_tiles(vae: Any, tiles: dict[str, Any]) -> None:
    """Gives a VAE these attributes; None has none."""
    if vae is not None:
        for name, value in tiles.items():
            setattr(vae, name, value)


def tiles_in_words(tiles: dict[str, Any]) -> list[str]:
    """The same as lines of Python, for a model card."""
    return [
        f"pipe.vae.{SWITCHES[name]}()" if name in SWITCHES and value else f"pipe.vae.{name} = {value!r}"
        for name, value in tiles.items()
    ]


def switch_on(pipe: Any) -> None:
    """Has a pipeline's VAE work in tiles.

    Raises:
        UserError: it has none, or one that cannot.
    """
    vae = pipe.components.get("vae")
    if not hasattr(vae, "use_tiling") or not hasattr(vae, "enable_tiling"):
        what = (
            f"the teacher's {type(vae).__name__} has no tiles"
            if vae is not None
            else "the teacher has no VAE"
        )
        raise UserError(f"data.tiling is true, but {what}: set it to false")
    vae.enable_tiling()


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in attributes.items()
        if (name in SWITCHES or name.startswith(SIZES)) and isinstance(value, bool | int | float)
    }
