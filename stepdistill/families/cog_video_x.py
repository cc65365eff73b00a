"""CogVideoX 1.0 and 1.5: CogVideoXTransformer3DModel on video latents whose frames come first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import VideoFamily
from stepdistill.families.size import Size


class CogVideoX(VideoFamily):
    """A state is [F, C, H, W]. The tokens of 1.5 reach over two frames: to an odd number of them its pipeline draws one
    more in front, which it does not decode."""

    name = "CogVideoX"
    pipelines = ("CogVideoXPipeline",)
    passes = frozenset({"generator"})
    picture_tokens = 0

    def adopt(self, pipe: Any) -> None:
        if pipe.transformer.config.ofs_embed_dim is not None:
            raise UserError(
                "the network of this CogVideoXPipeline takes an offset (ofs_embed_dim), which only pipelines that "
                "start from an image hand over: take one that draws from text"
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
        return frames + self._more(pipe.transformer, frames), channels, height, width

    def _more(self, net: Any, frames: int) -> int:
        """Frames of a state that are drawn beside these."""
        return -frames % (net.config.patch_size_t or 1)

    def feature_shape(self, net: Any, state: tuple[int, ...]) -> tuple[int, int, int]:
        frames, channels, height, width = state
        return super().feature_shape(net, (channels, frames // (net.config.patch_size_t or 1), height, width))

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        length = self._length(pipe)
        embeds, _ = pipe.encode_prompt(prompts, None, False, max_sequence_length=length, device=pipe.device)
        return Condition({"encoder_hidden_states": embeds})  # of full length

    def _length(self, pipe: Any) -> int:
        """Tokens of a prompt: as many as a network with learnt places was made for, and else as the call has them."""
        config = pipe.transformer.config
        given = int(call_default(pipe, "max_sequence_length"))
        return given if config.use_rotary_positional_embeddings else int(config.max_text_seq_length)

    def own_arguments(self, pipe: Any) -> dict[str, Any]:
        length = self._length(pipe)
        return {} if length == call_default(pipe, "max_sequence_length") else {"max_sequence_length": length}

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

    def decoded_part(self, pipe: Any, states: Tensor, size: Size) -> Tensor:
        return states[:, self._more(pipe.transformer, super().state_shape(pipe, size)[1]) :]

    def by_frame(self, pipe: Any, states: Tensor, size: Size) -> Tensor:
        return self.decoded_part(pipe, states, size)

    def to_states(self, pipe: Any, frames: Tensor) -> Tensor:
        states = super().to_states(pipe, frames)
        more = self._more(pipe.transformer, states.shape[1])
        return torch.cat([states[:, :1].expand(-1, more, -1, -1, -1), states], dim=1) if more else states

    def normalised(self, vae: Any, latents: Tensor) -> Tensor:
        return super().normalised(vae, latents).transpose(1, 2)

    def denormalised(self, vae: Any, states: Tensor) -> Tensor:
        return super().denormalised(vae, states.transpose(1, 2))
