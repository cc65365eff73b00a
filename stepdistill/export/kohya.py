"""A UNet's LoRA under the names of kohya's scripts, which ComfyUI and others read, too.

A layer is ``lora_unet_`` and its name with ``_`` for every dot; its tensors are ``lora_down.weight`` (A),
``lora_up.weight`` (B) and ``alpha``, whose share of the rank is the scale. The name is that of diffusers' UNet, and for
SDXL that of the UNet it was published with, on which kohya's scripts train it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}  # fmt: skip


def kohya_state(weights: Mapping[str, Tensor], alpha: float, config: Any) -> dict[str, Tensor]:
    """The tensors of such a file.

    Args:
        weights: ``LAYER.lora_A.weight`` [r, ...] and ``LAYER.lora_B.weight`` [..., r].
        alpha: scale times rank.
        config: of the UNet.
    """
    as_published = config.get("addition_embed_type") == "text_time"
    state: dict[str, Tensor] = {}
    for key, value in weights.items():
        layer, part = key.removesuffix(".weight").rsplit(".", 1)
        name = published_name(layer, config) if as_published else layer
        name = "lora_unet_" + name.replace(".", "_")
        state[f"{name}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = value.contiguous()
        state[f"{name}.alpha"] = torch.tensor(float(alpha))
    return state


def published_name(layer: str, config: Any) -> str:
    """The name of a layer of diffusers' SDXL UNet in the one it was published with."""
    per_block = config["layers_per_block"] + 1
    if (middle := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", layer)) is not None:
        kind, number, rest = middle.groups()
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
        return f"{place}.{_inner(kind, rest)}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", layer)
    if found is None:
        raise ValueError(f"{layer} is in no block of a UNet")
    way, block, kind, number, rest = found.groups()
    first = int(block) * per_block
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block}.0.op"
    if kind == "upsamplers":
        after = 2 if "CrossAttn" in config["up_block_types"][int(block)] else 1
        return f"output_blocks.{first + per_block - 1}.{after}.conv"
    own = first + int(number)
    at = f"input_blocks.{own + 1}" if way == "down" else f"output_blocks.{own}"
    return f"{at}.{int(kind == 'attentions')}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    return RESNET[rest] if kind == "resnets" else rest
