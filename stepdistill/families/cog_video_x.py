"""CogVideoX 1.0: CogVideoXTransformer3DModel on video latents whose frames come first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import VideoFamily
from stepdistill.families.size import Size


class CogVideoX(VideoFamily):
    """A state is [F, C, H, W]."""

    name = "CogVideoX 1.0"
    pipelines = ("CogVideoXPipeline",)
    passes = frozenset({"generator"})
    picture_tokens = 0

    def adopt(self, pipe: Any) -> None:
        if pipe.transformer.config.patch_size_t is not None:
            raise UserError(
                "this CogVideoXPipeline is a CogVideoX 1.5, whose tokens reach over frames and which draws some to "
                "throw them away: only CogVideoX 1.0 can teach"
            )

    def default_size(self, pipe: Any) -> Size:
        config, side = pipe.transformer.config, self.pixels(pipe)
        return Size(config.sample_height * side, config.sample_width * side, config.sample_frames)

    def pixels(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor_spatial)

    def stride(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor_temporal)

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        channels, frames, height, width = super().state_shape(pipe, size)
        return frames, channels, height, width

    def feature_shape(self, net: Any, state: tuple[int, ...]) -> tuple[int, int, int]:
        return super().feature_shape(net, (state[1], state[0], *state[2:]))

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        length = call_default(pipe, "max_sequence_length")
        embeds, _ = pipe.encode_prompt(prompts, None, False, max_sequence_length=length, device=pipe.device)
        return Condition({"encoder_hidden_states": embeds})  # of full length

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: Any, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        from diffusers import CogVideoXPipeline

        frames, (height, width), rope = x_t.shape[1], x_t.shape[3:], None
        if net.config.use_rotary_positional_embeddings:
            around = SimpleNamespace(transformer=net, vae_scale_factor_spatial=1)  # sides of states
            prepare: Any = CogVideoXPipeline._prepare_rotary_positional_embeddings
            rope = prepare(around, height, width, frames, x_t.device)
        output: Tensor = net(
            hidden_states=x_t,
            encoder_hidden_states=cond["encoder_hidden_states"],
            timestep=time,
            image_rotary_emb=rope,
            return_dict=False,
        )[0]
        return output

    def normalised(self, vae: Any, latents: Tensor) -> Tensor:
        return super().normalised(vae, latents).transpose(1, 2)

    def denormalised(self, vae: Any, states: Tensor) -> Tensor:
        return super().denormalised(vae, states.transpose(1, 2))
