"""Unconditional and class-conditional UNet2DModel on pixels (DDPM, DDIM and PNDM pipelines; ConsistencyModelPipeline
with a discrete scheduler, as class-conditional students are exported)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families._late_blocks import unet_decoder
from stepdistill.families._pixels import unit_pixels
from stepdistill.families._second_time import GAP_SCALE
from stepdistill.families._slim_unet import slim_unet
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import LabelFamily, UNetFamily
from stepdistill.families.network_changes import NetworkChanges, gap_of, of_one_length
from stepdistill.families.size import Size


class UNetChanges(NetworkChanges):
    """Its second time goes through the slot for class embeddings, where an unconditional network leaves it empty."""

    def slimmer(self, net: nn.Module, width: float, depth: float) -> nn.Module:
        return slim_unet(net, width, depth)

    def has_second_time(self, net: Any) -> bool:
        return self.takes_gap(net) or super().has_second_time(net)

    def takes_gap(self, net: Any) -> bool:
        """Whether t - s is handed to it in the place of classes."""
        return bool(net.config.class_embed_type == "timestep")

    def second_time(self, net: Any) -> nn.Module:
        if net.class_embedding is not None:
            return super().second_time(net)
        wider = type(net).from_config(net.config, class_embed_type="timestep")
        wider.load_state_dict({**wider.state_dict(), **net.state_dict()})
        nn.init.zeros_(wider.class_embedding.linear_2.weight)
        nn.init.zeros_(wider.class_embedding.linear_2.bias)
        return wider.to(net.device).train(net.training)  # type: ignore[no-any-return]

    def late_blocks(self, net: Any) -> nn.Module:
        return unet_decoder(net)

    @torch.no_grad()
    def fold_second_time(self, net: Any, gap: float | None, call: Callable[[], object]) -> nn.Module:
        if not self.takes_gap(net):
            return super().fold_second_time(net, gap, call)
        gap = of_one_length(gap, net)
        plain = type(net).from_config(net.config, class_embed_type=None)
        state = {k: v for k, v in net.state_dict().items() if not k.startswith("class_embedding.")}
        plain.load_state_dict(state)
        phase = net.time_proj(torch.tensor([GAP_SCALE * gap], device=net.device))
        plain.to(net.device).time_embedding.linear_2.bias += net.class_embedding(phase)[0]
        return plain.train(net.training)  # type: ignore[no-any-return]

    @torch.no_grad()
    def without_variance(self, net: Any) -> nn.Module:
        # A learned variance (Nichol and Dhariwal 2021, 2102.09672) is channels after those of the mean, which
        # LCMScheduler, DDIMScheduler and TCDScheduler do not expect.
        kept, state = net.config.in_channels, net.state_dict()
        if net.config.out_channels == kept:
            return net  # type: ignore[no-any-return]
        plain = type(net).from_config(net.config, out_channels=kept)
        last = ("conv_out.weight", "conv_out.bias")
        plain.load_state_dict({k: v[:kept] if k in last else v for k, v in state.items()})
        return plain.to(net.device).train(net.training)  # type: ignore[no-any-return]


class UNet2D(LabelFamily, UNetFamily):
    name = "unconditional or class-conditional UNet2DModel"
    pipelines = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ConsistencyModelPipeline")
    changes = UNetChanges()

    def student_pipeline(self, pipe: Any, net: nn.Module) -> str | None:
        # DDIMPipeline and PNDMPipeline turn every scheduler into their own, and DDPMPipeline passes no class labels.
        return "ConsistencyModelPipeline" if self.classes(pipe) else "DDPMPipeline"

    def call_arguments(
        self, pipeline: str, prompts: list[str], guidance: float | None, size: Size | None
    ) -> dict[str, Any]:
        if pipeline == "DDPMPipeline":
            return {"batch_size": len(prompts)}
        return {"batch_size": len(prompts), "class_labels": [int(prompt) for prompt in prompts]}

    def classes(self, pipe: Any) -> int:
        return int(pipe.unet.config.num_class_embeds or 0)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        labels = cond.get("class_labels")
        if self.changes.takes_gap(net):
            labels = GAP_SCALE * gap_of(x_t, cond)
        output: Tensor = net(x_t, time, class_labels=labels, return_dict=False)[0]
        return output[:, : x_t.shape[1]]

    def pixels(self, pipe: Any) -> int:
        return 1

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        shape, given = super().state_shape(pipe, size), pipe.unet.config.out_channels
        if given < shape[0]:
            raise UserError(
                f"this UNet2DModel takes {shape[0]} channels and returns {given}: a teacher returns those it takes, "
                "with or without their variances after them"
            )
        return shape

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return None

    def to_states(self, pipe: Any, frames: Tensor) -> Tensor:
        return frames[:, 0]

    def to_frames(self, pipe: Any, x0: Tensor) -> Tensor:
        return unit_pixels(x0[:, None])
