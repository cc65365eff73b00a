"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel with a flow-matching path."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stepdistill.families.base import TRANSFORMER_LORA, Family
from stepdistill.types import Condition


class StableDiffusion3(Family):
    name = "Stable Diffusion 3"
    pipelines = ("StableDiffusion3Pipeline",)
    denoiser = "transformer"
    lora_targets = TRANSFORMER_LORA
    passes_generator = False

    def call(self, net: nn.Module, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        output: Tensor = net(
            hidden_states=x_t,
            timestep=timestep,
            encoder_hidden_states=cond.tensors["encoder_hidden_states"],
            pooled_projections=cond.tensors["pooled_projections"],
            return_dict=False,
        )[0]
        return output

    def encode(self, pipe: Any, prompts: list[str]) -> Condition:
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, device=pipe.device, do_classifier_free_guidance=False
        )
        return Condition({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def null(self, pipe: Any) -> Condition | None:
        return self.encode(pipe, [""])

    def features_of(self, net: nn.Module) -> nn.Module:
        blocks = net.get_submodule("transformer_blocks")
        return net.get_submodule(f"transformer_blocks.{len(list(blocks.children())) // 2}")

    def feature_shape(self, net: Any) -> tuple[int, int, int]:
        height, width = (size // net.config.patch_size for size in self.size_of(net))
        return int(net.config.num_attention_heads * net.config.attention_head_dim), height, width
