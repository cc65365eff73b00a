"""Kandinsky 5 (text to video): Kandinsky5Transformer3DModel on video latents whose channels come last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.families._lengths import length_by_length, padded
from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import VideoFamily
from stepdistill.families.size import Size

FAULTS = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)
"""What its call guides away from where it is told no other negative prompt."""


class Kandinsky5(VideoFamily):
    """A state is [F, H, W, C]. A network that can also start from a picture (``visual_cond``) is given as many zeros
    beside the channels of a state, and one more for their mask."""

    name = "Kandinsky 5"
    pipelines = ("Kandinsky5T2VPipeline",)
    alone = True
    size_conditions = frozenset({"size"})
    blocks = "visual_transformer_blocks"
    lora_targets = tuple(
        "to_query to_key to_value self_attention.out_layer cross_attention.out_layer feed_forward.in_layer "
        "feed_forward.out_layer".split()
    )

    def adopt(self, pipe: Any) -> None:
        if (kind := pipe.transformer.config.attention_type) != "regular":
            raise UserError(
                f"the network of this Kandinsky5T2VPipeline has {kind} attention, which draws by flex attention alone, "
                "set by hand on every pipeline that is loaded: take a checkpoint whose attention_type is regular"
            )

    def pixels(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor_spatial)

    def patch(self, net: Any) -> int:
        return int(net.config.patch_size[1])

    def stride(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor_temporal)

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        side, frames = self.pixels(pipe), (size.frames - 1) // self.stride(pipe) + 1
        channels = int(pipe.transformer.config.in_visual_dim)
        return frames, size.height // side, size.width // side, channels

    def tokens(self, net: Any, state: tuple[int, ...]) -> int:
        frames, height, width, channels = state
        return super().tokens(net, (channels, frames, height, width))

    def feature_shape(self, net: Any, state: tuple[int, ...]) -> tuple[int, int, int]:
        frames, height, width, _ = state
        patch = self.patch(net)
        return int(net.config.model_dim), frames * (height // patch), width // patch

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        # Alone, as its encoder and its network read what pads a prompt to the longest of several.
        length = call_default(pipe, "max_sequence_length")
        each = [
            pipe.encode_prompt([prompt], max_sequence_length=length, device=pipe.device) for prompt in prompts
        ]
        pooled = torch.cat([own for _, own, _ in each])
        sides = torch.tensor([[size.height, size.width]], device=pooled.device).expand(len(each), -1)
        told = {"pooled_projections": pooled, "size": sides}
        return Condition(padded("encoder_hidden_states", [tokens[0] for tokens, _, _ in each]) | told)

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [FAULTS], size)

    def call(self, net: Any, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        from diffusers import Kandinsky5T2VPipeline

        scale = Kandinsky5T2VPipeline._get_scale_factor(net, *cond["size"][0].tolist())
        frames, height, width = x_t.shape[1:4]
        patch = self.patch(net)
        places = [torch.arange(side, device=x_t.device) for side in (frames, height // patch, width // patch)]

        def of_one_length(x: Tensor, told: Tensor, own: Condition) -> Tensor:
            tokens = own["encoder_hidden_states"]
            picture = (torch.zeros_like(x), torch.zeros_like(x[..., :1])) if net.config.visual_cond else ()
            output: Tensor = net(
                hidden_states=torch.cat([x, *picture], dim=-1),
                encoder_hidden_states=tokens,
                pooled_projections=own["pooled_projections"],
                timestep=told,
                visual_rope_pos=places,
                text_rope_pos=torch.arange(tokens.shape[1], device=x.device),
                scale_factor=scale,
            ).sample
            return output

        return length_by_length(net, ["encoder_hidden_states"], of_one_length, x_t, time, cond)

    def by_frame(self, pipe: Any, states: Tensor, size: Size) -> Tensor:
        return states.movedim(-1, 2)

    def normalised(self, vae: Any, latents: Tensor) -> Tensor:
        return super().normalised(vae, latents).movedim(1, -1)

    def denormalised(self, vae: Any, states: Tensor) -> Tensor:
        return super().denormalised(vae, states.movedim(-1, 1))
