"""LTX-Video: LTXVideoTransformer3DModel on packed video latents, one token each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.diffusion.shift import shift_of
from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import VideoFamily
from stepdistill.families.size import Size

RATES = "rates"
"""The condition [B, 3] that says how many frames and pixels a token stands for, and how many frames a second has."""


class LTXVideo(VideoFamily):
    name = "LTX-Video"
    pipelines = ("LTXPipeline",)
    passes = frozenset({"sigmas", "mu"})

    def pixels(self, pipe: Any) -> int:
        return int(pipe.vae_spatial_compression_ratio)

    def stride(self, pipe: Any) -> int:
        return int(pipe.vae_temporal_compression_ratio)

    def unit(self, pipe: Any) -> int:
        return max(32, super().unit(pipe))  # written in its call

    def shift(self, pipe: Any, tokens: int) -> float:
        # Its times are stretched once more, to end at shift_terminal with any number of steps: that is the sampler's.
        return shift_of(pipe.scheduler, tokens, stretched=True)

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        length = call_default(pipe, "max_sequence_length")
        embeds, mask, *_ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=pipe.device
        )
        rates = [self.stride(pipe), self.pixels(pipe), call_default(pipe, "frame_rate")]
        return Condition(
            {
                "encoder_hidden_states": embeds,
                "encoder_attention_mask": mask,
                RATES: torch.tensor([rates] * len(embeds), device=embeds.device),
            }
        )

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def pack(self, x_t: Tensor) -> Tensor:
        return x_t.flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor, state: tuple[int, ...]) -> Tensor:
        states: Tensor = packed.transpose(1, 2).unflatten(2, state[1:])
        return states

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        frames, height, width = x_t.shape[2:]
        per_frame, per_side, per_second = cond[RATES][0]
        output: Tensor = net(
            hidden_states=self.pack(x_t),
            encoder_hidden_states=cond["encoder_hidden_states"],
            timestep=time,
            encoder_attention_mask=cond["encoder_attention_mask"].long(),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(per_frame / per_second, per_side, per_side),
            return_dict=False,
        )[0]
        return self.unpack(output, tuple(x_t.shape[1:]))

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        # A decoder that removes the last of the noise is told that there is none, as by the call's default.
        time = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        videos: Tensor = vae.decode(latents, time, return_dict=False)[0]
        return videos

    def normalised(self, vae: Any, latents: Tensor) -> Tensor:
        mean, deviation = _moments(vae)
        return (latents - mean) / deviation

    def denormalised(self, vae: Any, states: Tensor) -> Tensor:
        mean, deviation = _moments(vae)
        return states * deviation + mean


def _moments(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of latents, each [1, C, 1, 1, 1]."""
    mean, deviation = (value.view(1, -1, 1, 1, 1) for value in (vae.latents_mean, vae.latents_std))
    return mean, deviation / vae.config.scaling_factor
