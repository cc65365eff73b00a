"""Wan 2.1's network in the class of diffusers that is told both ends of a jump: AnyFlowTransformer3DModel.

AnyFlow, 2026, 2605.13724. Its network is Wan 2.1's with a second embedding of a time, which is told s and mixed into
that of t, (1 - g) e(t) + g e'(s) with g = 0.25; all other weights have Wan's names. Where e' starts as a copy of e, it
says at s = t what Wan's says. Elsewhere it starts as another network, as one with late blocks does. No fold is needed:
a stock pipeline draws with it in any number of steps.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families.condition import GAP, Condition
from stepdistill.families.network_changes import NetworkChanges

WAN = "WanTransformer3DModel"
NAME = "AnyFlowTransformer3DModel"
PIPELINE = "AnyFlowPipeline"
WITHOUT = {"qk_norm": "rms_norm_across_heads", "added_kv_proj_dim": None, "pos_embed_seq_len": None}
"""What of Wan's config AnyFlow's class does not have, with the value that it is as."""


def is_any_step(net: nn.Module) -> bool:
    """Whether a network is of that class."""
    return type(net).__name__ == NAME


class WanChanges(NetworkChanges):
    """What can be changed in Wan's network."""

    def any_step(self, net: nn.Module) -> nn.Module:
        import diffusers

        if type(net).__name__ != WAN:
            return super().any_step(net)
        kind: Any = getattr(diffusers, NAME)
        config = dict(cast(Any, net).config)
        odd = {key: config[key] for key, value in WITHOUT.items() if config.get(key, value) != value}
        if odd or config.get("image_dim") is not None:
            key, value = next(iter(odd.items()), ("image_dim", config.get("image_dim")))
            raise UserError(
                f"options.second_time=stock needs a network of Wan 2.1 that draws from texts, and this one has {key} = "
                f"{value}: set it to embedded"
            )
        takes = inspect.signature(kind.__init__).parameters
        made: nn.Module = kind(**{key: value for key, value in config.items() if key in takes})
        state, first, second = net.state_dict(), ".time_embedder.", ".delta_embedder."
        copied = {key.replace(first, second): value for key, value in state.items() if first in key}
        made.load_state_dict({**state, **copied})
        like = next(net.parameters())
        trained = made.to(like.device, like.dtype).train(net.training)
        return trained.requires_grad_(like.requires_grad)

    def has_second_time(self, net: Any) -> bool:
        return is_any_step(net) or super().has_second_time(net)

    def told_ends(self, net: nn.Module) -> bool:
        return is_any_step(net) or super().told_ends(net)

    def draws_in_any_steps(self, net: nn.Module) -> bool:
        return is_any_step(net)

    def fold_second_time(self, net: nn.Module, gap: float | None, call: Any) -> nn.Module:
        return net if is_any_step(net) else super().fold_second_time(net, gap, call)


def call_any_step(net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
    """What such a network says of states [B, C, F, H, W] at its own time [B], shaped as they are. It takes frames
    before channels, and both times of each frame."""
    frames, end = x_t.shape[2], cond.get(GAP)
    both = [each[:, None].expand(-1, frames) for each in (time, time if end is None else end.to(time))]
    output: Tensor = net(
        hidden_states=x_t.transpose(1, 2),
        timestep=both[0],
        r_timestep=both[1],
        encoder_hidden_states=cond["encoder_hidden_states"],
        return_dict=False,
    )[0]
    return output.transpose(1, 2)
