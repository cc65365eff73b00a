"""A smaller network of the teacher's own class: fewer channels, fewer layers, random weights.

Only the config changes, so that a student with it is saved and loaded by diffusers as any network of the class is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stepdistill.errors import UserError

Layers = int | Sequence[Any] | None
"""diffusers' layer counts: one, one a resolution, or nested."""


def slim_unet(net: nn.Module, width: float, depth: float) -> nn.Module:
    """A UNet2DModel or UNet2DConditionModel as ``net``, smaller, with random weights that are the same at every call.

    Channels are multiples of the GroupNorm's groups, and each attention keeps a head count (UNet2DModel: channels of a
    head) not above the old one that divides them. What the text encoder or the latents decide stays as it is.

    Args:
        net: the network whose class, inputs and outputs are kept.
        width: channels over the old ones, in (0, 1].
        depth: layers of each resolution over the old ones, in (0, 1]; at least one is left.

    Raises:
        UserError: where nothing would get smaller.
    """
    from diffusers import UNet2DConditionModel, UNet2DModel

    assert isinstance(net, UNet2DModel | UNet2DConditionModel)
    config: Any = net.config
    unit = config.norm_num_groups or 1
    channels = [max(1, round(old * width / unit)) * unit for old in config.block_out_channels]
    changed: dict[str, Any] = {
        "block_out_channels": tuple(channels),
        "layers_per_block": _fewer(config.layers_per_block, depth),
    }
    heads = config.attention_head_dim
    if isinstance(net, UNet2DConditionModel):
        each = [heads] * len(channels) if isinstance(heads, int) else list(heads)
        changed["attention_head_dim"] = tuple(
            _divisor(most, [own]) for most, own in zip(each, channels, strict=True)
        )
        for key in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
            changed[key] = _fewer(config[key], depth)
    elif heads is not None:
        changed["attention_head_dim"] = _divisor(heads, channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # As keywords: from_config drops a key of its first argument that the network had by default.
        kind: Any = type(net)
        smaller: nn.Module = kind.from_config(config, **changed)
    count, before = (sum(p.numel() for p in each.parameters()) for each in (smaller, net))
    if count >= before:
        raise UserError(
            f"options.width={width:g} and options.depth={depth:g} leave {count:,} of {before:,} weights: channels come "
            f"in multiples of {unit} ({', '.join(map(str, config.block_out_channels))}), and a layer is always left"
        )
    return smaller.to(next(net.parameters()).device).train(net.training)


def _fewer(layers: Layers, depth: float) -> Any:
    if layers is None:
        return None
    return max(1, round(layers * depth)) if isinstance(layers, int) else [_fewer(n, depth) for n in layers]


def _divisor(most: int, of: Sequence[int]) -> int:
    """The greatest number up to ``most`` that divides every one of ``of``."""
    return next(n for n in range(most, 0, -1) if all(value % n == 0 for value in of))
