"""Tiny random pipelines that draw from a picture, and prompts that name some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import SIZES, _flux, _louder, _wan
from tiny_more import BUILDERS as MORE
from tiny_more import qwen_tokenizer, qwen_vl
from tiny_parts import tiny_clip_vision
from torch import nn

from stepdistill.families.size import Size
from stepdistill.pictures.given import with_picture


def _wan_i2v(two: bool = False, inside: bool = False) -> Any:
    """Of Wan 2.1, whose network is told CLIP's picture too, of 2.2, which has two, or of 2.2 5B, whose state holds the
    picture."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor

    text = _wan()

    def network() -> Any:
        more = {} if two else {"image_dim": 16, "added_kv_proj_dim": 24}
        more = {} if inside else {"in_channels": 12, **more}
        return WanTransformer3DModel.from_config(text.transformer.config, **more)

    parts = {name: text.components[name] for name in ("vae", "scheduler", "text_encoder", "tokenizer")}
    if inside:
        parts |= {"expand_timesteps": True}
    elif two:
        parts |= {"transformer_2": network(), "boundary_ratio": 0.9}
    else:
        square = {"height": 32, "width": 32}
        parts |= {
            "image_encoder": tiny_clip_vision(),
            "image_processor": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square),
        }
    return WanImageToVideoPipeline(**parts, transformer=network())


def _kontext() -> Any:
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**{k: v for k, v in _flux().components.items() if v is not None})


def _edit(plus: bool) -> Any:
    from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageEditPlusPipeline
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    special = {f"{kind}_token_id": f"<|{name}|>" for kind, name in SEEN.items()}
    tokenizer = qwen_tokenizer(*special.values())
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}
    parts = {**MORE["qwen-image"]().components, "tokenizer": tokenizer, "text_encoder": qwen_vl(**ids)}
    # It is given its pictures with a million pixels, whatever it draws: few tokens, where one is 64 of them wide.
    parts["vae"] = AutoencoderKLQwenImage.from_config(
        parts["vae"].config, dim_mult=[1] * 6, temperal_downsample=[False, True, False, False, False]
    )
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=64 * 64),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
    )
    kind = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    return kind(**parts, processor=processor)


SEEN = {
    "vision_start": "vision_start",
    "image": "image_pad",
    "vision_end": "vision_end",
    "video": "video_pad",
}
"""Special tokens beside a picture, by their names in a config."""


BUILDERS: dict[str, Callable[[], Any]] = {
    "wan-i2v": _wan_i2v,
    "wan-2.2-i2v": lambda: _wan_i2v(two=True),
    "wan-2.2-ti2v": lambda: _wan_i2v(inside=True),
    "kontext": _kontext,
    "klein-edit": lambda: MORE["klein"](),
    "flux-2-edit": lambda: MORE["flux-2"](),
    "qwen-edit": lambda: _edit(plus=False),
    "qwen-edit-plus": lambda: _edit(plus=True),
}
SIZES = {
    **dict.fromkeys(("wan-i2v", "wan-2.2-i2v", "wan-2.2-ti2v"), SIZES["wan"]),
    "kontext": Size(16, 24),
    **dict.fromkeys(("klein-edit", "flux-2-edit"), Size(64, 96)),  # a picture may not be smaller
    **dict.fromkeys(("qwen-edit", "qwen-edit-plus"), Size(64, 256)),
}


def tiny_from_picture(name: str) -> Any:
    """A pipeline of BUILDERS with random weights, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(list(BUILDERS).index(name))
        pipe = BUILDERS[name]()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                _louder(component)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictured(folder: Path, count: int, size: Size) -> list[str]:
    """Prompts that name a picture of noise each, which lie in the folder at the size."""
    words = ["make it red", "a cat turns its head", "add a hat", "at night"][:count]
    files = [folder / f"{i}.png" for i in range(count)]
    for i, file in enumerate(files):
        coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size.width, size.height), Image.Resampling.NEAREST).save(file)
    return [with_picture(text, file) for text, file in zip(words, files, strict=True)]
