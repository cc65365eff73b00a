"""HunyuanVideo: HunyuanVideoTransformer3DModel on video latents; guidance is an input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stepdistill.families._embedded_guidance import EmbeddedGuidance
from stepdistill.families.base import call_default
from stepdistill.families.condition import GUIDANCE, Condition
from stepdistill.families.kinds import VideoFamily
from stepdistill.families.size import Size

TEXT = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")


class HunyuanVideo(VideoFamily):
    name = "HunyuanVideo"
    pipelines = ("HunyuanVideoPipeline",)
    passes = frozenset({"sigmas"})
    lora_targets = (*VideoFamily.lora_targets, "proj_mlp")
    picture_tokens = 0
    changes = EmbeddedGuidance()

    def pixels(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor_spatial)

    def stride(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor_temporal)

    def unit(self, pipe: Any) -> int:
        return max(16, super().unit(pipe))  # written in its call

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        own = {name: call_default(pipe, name) for name in ("prompt_template", "max_sequence_length")}
        return Condition(dict(zip(TEXT, pipe.encode_prompt(prompts, device=pipe.device, **own), strict=True)))

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return None

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        scale = cond.get(GUIDANCE)
        output: Tensor = net(
            hidden_states=x_t,
            timestep=time,
            guidance=None if scale is None else 1000 * scale,
            **{name: cond[name] for name in TEXT},
            return_dict=False,
        )[0]
        return output
