"""UNet2DConditionModel with a guidance input or a second time, through its slot for a condition beside the timestep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.families._late_blocks import unet_decoder
from stepdistill.families._second_time import GAP_DIM, GAP_SCALE, sinusoid
from stepdistill.families._slim_unet import slim_unet
from stepdistill.families.condition import GUIDANCE, Condition
from stepdistill.families.network_changes import NetworkChanges, gap_of, of_one_length

GUIDANCE_DIM = 256
"""Width of the guidance embedding in LCM (Luo et al. 2023, 2310.04378)."""


class UNetConditionChanges(NetworkChanges):
    def slimmer(self, net: nn.Module, width: float, depth: float) -> nn.Module:
        return slim_unet(net, width, depth)

    def guidance_input(self, net: nn.Module) -> nn.Module:
        return _with_time_condition(net, GUIDANCE_DIM)

    def takes_guidance(self, net: Any) -> bool:
        return net.config.time_cond_proj_dim not in (None, GAP_DIM)

    def fold_guidance(self, net: Any, guidance: float) -> nn.Module:
        return _folded(net, embed_guidance(net, torch.tensor([guidance], device=net.device)))

    def has_second_time(self, net: Any) -> bool:
        return net.config.time_cond_proj_dim == GAP_DIM or super().has_second_time(net)

    def second_time(self, net: Any) -> nn.Module:
        """Through the slot for a condition beside the timestep, the one LCM has for its guidance, where it is free."""
        if net.config.time_cond_proj_dim is not None:
            return super().second_time(net)
        return _with_time_condition(net, GAP_DIM)

    def late_blocks(self, net: Any) -> nn.Module:
        return unet_decoder(net)

    def fold_second_time(self, net: Any, gap: float | None, call: Callable[[], object]) -> nn.Module:
        if net.config.time_cond_proj_dim != GAP_DIM:
            return super().fold_second_time(net, gap, call)
        gap = of_one_length(gap, net)
        return _folded(net, sinusoid(torch.tensor([GAP_SCALE * gap], device=net.device), GAP_DIM))

    def time_condition(self, net: Any, x_t: Tensor, cond: Condition) -> Tensor | None:
        """What goes into the slot: the embedded length of a jump, or an embedded guidance scale [B, D]."""
        if net.config.time_cond_proj_dim == GAP_DIM:
            return sinusoid(GAP_SCALE * gap_of(x_t, cond), GAP_DIM).to(x_t.dtype)
        scale = cond.get(GUIDANCE)
        return None if scale is None else embed_guidance(net, scale).to(x_t.dtype)


def embed_guidance(net: Any, guidance: Tensor) -> Tensor:
    """The embedding [B, D] of guidance scales [B], as the pipelines' ``get_guidance_scale_embedding``: the sinusoid of
    1000 (g - 1)."""
    return sinusoid(1000 * (guidance.float() - 1), net.config.time_cond_proj_dim or GUIDANCE_DIM)


@torch.no_grad()
def _folded(net: Any, condition: Tensor) -> nn.Module:
    """A copy without the condition beside the timestep that equals the network under ``condition`` [1, D]."""
    plain = type(net).from_config(net.config, time_cond_proj_dim=None)
    added = "time_embedding.cond_proj.weight"
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != added})
    # cond_proj adds to the input of linear_1, so a constant there is a constant in linear_1's bias.
    shift = net.time_embedding.cond_proj(condition) @ net.time_embedding.linear_1.weight.T
    plain.to(net.device).time_embedding.linear_1.bias += shift[0]
    return plain.train(net.training)  # type: ignore[no-any-return]


def _with_time_condition(net: Any, width: int) -> nn.Module:
    """A copy with a condition of this width beside the timestep, of no effect at the start."""
    # As a keyword: from_config drops a key of its first argument that the network had by default.
    wider = type(net).from_config(net.config, time_cond_proj_dim=width)
    wider.load_state_dict({**wider.state_dict(), **net.state_dict()})
    torch.nn.init.zeros_(wider.time_embedding.cond_proj.weight)
    return wider.to(net.device).train(net.training)  # type: ignore[no-any-return]
