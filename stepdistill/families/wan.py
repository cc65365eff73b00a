"""Wan 2.1, and the Wan 2.2 of one network: WanTransformer3DModel on video latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import VideoFamily
from stepdistill.families.size import Size


class Wan(VideoFamily):
    name = "Wan 2.1, Wan 2.2 TI2V-5B"
    pipelines = ("WanPipeline",)
    blocks = "blocks"
    lora_targets = (*VideoFamily.lora_targets, "ffn.net.0.proj", "ffn.net.2")

    def adopt(self, pipe: Any) -> None:
        if pipe.transformer is None or pipe.transformer_2 is not None:
            raise UserError(
                "this WanPipeline has two networks, of which each draws in its own stretch of noise: only Wan 2.1 and "
                "the Wan 2.2 of one network (TI2V-5B) can teach"
            )

    def pixels(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor_spatial)

    def patch(self, net: Any) -> int:
        return int(net.config.patch_size[1])

    def stride(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor_temporal)

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        # Zeros up to the length of the call's default, without a mask, as the network was trained.
        length = call_default(pipe, "max_sequence_length")
        embeds, _ = pipe.encode_prompt(prompts, None, False, max_sequence_length=length, device=pipe.device)
        return Condition({"encoder_hidden_states": embeds})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        # Wan 2.2's pipeline tells every token its time, which is one for all but where a picture is given.
        embeds = cond["encoder_hidden_states"]
        output: Tensor = net(
            hidden_states=x_t, timestep=time, encoder_hidden_states=embeds, return_dict=False
        )[0]
        return output
