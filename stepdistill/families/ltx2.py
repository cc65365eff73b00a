"""LTX-2: LTX2VideoTransformer3DModel on a video and its sound at once, each packed one token a place.

A state is both, flat, as its pipeline draws them: the video's latents [C, F, H, W], then the sound's [C, L, M]. One
guidance scale serves both; the pipeline's other guidance (perturbed blocks, one without the other) is left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.ltx import LTXVideo
from stepdistill.families.size import Size

Shape = tuple[int, ...]

LAYOUT = "layout"
"""The condition [B, F, H, W, L, M, 0] that says by its shape alone how many latents a video and its sound have: a plan
has shapes, and no numbers."""

UNGUIDED = {
    "guidance_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
}
"""What its call is told, as each of these is on by default."""


class LTX2(LTXVideo):
    name = "LTX-2"
    pipelines = ("LTX2Pipeline",)
    told_size = True  # or its duration head says how many frames there are
    remark = (
        "LTX-2 is distilled with its sound, under plain guidance of one scale for both: guidance by perturbed blocks, "
        "by one modality without the other, and its rescaling are left out"
    )

    def default_size(self, pipe: Any) -> Size:
        return Size(call_default(pipe, "height"), call_default(pipe, "width"), 121)  # written in its call

    def check_size(self, pipe: Any, size: Size) -> None:
        super().check_size(pipe, size)
        video, sound = self._shapes(pipe, size)
        if math.prod(video) % 16 or math.prod(sound) < 16:  # torch draws by sixteen
            raise UserError(
                f"data.size is {size}, whose latents of {video} and {sound} numbers cannot be drawn as one: take more "
                "pixels or frames"
            )

    def state_shape(self, pipe: Any, size: Size) -> Shape:
        return (sum(map(math.prod, self._shapes(pipe, size))),)

    def drawn_tokens(self, pipe: Any, size: Size) -> int:
        _, *sides = self._shapes(pipe, size)[0]
        return math.prod(sides)

    def _shapes(self, pipe: Any, size: Size) -> tuple[Shape, Shape]:
        """The shapes of a video's latents and its sound's."""
        rate = pipe.audio_sampling_rate / pipe.audio_hop_length / pipe.audio_vae_temporal_compression_ratio
        sound = pipe.audio_vae.config
        bins = sound.mel_bins // pipe.audio_vae_mel_compression_ratio
        length = round(size.frames / call_default(pipe, "frame_rate") * rate)
        return super().state_shape(pipe, size), (sound.latent_channels, length, bins)

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        embeds, mask, *_ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=call_default(pipe, "max_sequence_length"),
            device=pipe.device,
        )
        video, sound, mask = pipe.connectors(embeds, mask, padding_side=pipe.tokenizer.padding_side)
        (_, *sides), (_, length, bins) = self._shapes(pipe, size)
        return Condition(
            {
                "encoder_hidden_states": video,
                "audio_encoder_hidden_states": sound,
                "encoder_attention_mask": mask,
                LAYOUT: video.new_zeros(len(prompts), *sides, length, bins, 0),
            }
        )

    def decoded_part(self, pipe: Any, states: Tensor, size: Size) -> Tensor:
        video, _ = self._shapes(pipe, size)
        latents: Tensor = states[:, : math.prod(video)].unflatten(1, video)
        return latents

    def examples_refused(self, pipe: Any) -> str:
        return "LTX-2 learns from no videos here, as they come without sound: leave out what learns from data"

    def to_states(self, pipe: Any, frames: Tensor) -> Tensor:
        raise UserError(self.examples_refused(pipe))

    def features_of(self, net: nn.Module) -> nn.Module:
        raise UserError(
            "LTX-2 has no features for a GAN here, which would judge a video without its sound: set GAN weights to 0"
        )

    def pack(self, x_t: Tensor) -> Tensor:
        return x_t  # its two schedulers step each part of it, value by value

    def unpack(self, packed: Tensor, state: Shape) -> Tensor:
        return packed

    def scheduled(self, pipe: Any, x_t: Tensor, size: Size) -> list[Tensor]:
        return list(_tokens(x_t, *self._shapes(pipe, size)))

    def unscheduled(self, pipe: Any, parts: list[Tensor], size: Size) -> Tensor:
        return _state(parts[0], parts[1], *self._shapes(pipe, size))

    def call(self, net: Any, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        frames, height, width, length, bins = cond[LAYOUT].shape[1:-1]
        shapes = (
            (net.config.in_channels, frames, height, width),
            (net.config.audio_in_channels // bins, length, bins),
        )
        video, sound = _tokens(x_t, *shapes)
        mask = cond["encoder_attention_mask"].long()
        seen, heard = net(
            hidden_states=video,
            audio_hidden_states=sound,
            encoder_hidden_states=cond["encoder_hidden_states"],
            audio_encoder_hidden_states=cond["audio_encoder_hidden_states"],
            timestep=time,
            sigma=time,
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
            audio_num_frames=length,
            use_cross_timestep=True,
            return_dict=False,
        )
        return _state(seen, heard, *shapes)

    def call_arguments(
        self, pipeline: str, prompts: list[str], guidance: float | None, size: Size | None
    ) -> dict[str, Any]:
        return super().call_arguments(pipeline, prompts, guidance, size) | UNGUIDED


def _tokens(x_t: Tensor, video: Shape, sound: Shape) -> tuple[Tensor, Tensor]:
    """The tokens [B, N, D] of a video and of its sound, whose latents have these shapes, of flat states."""
    seen, heard = x_t.split([math.prod(video), math.prod(sound)], 1)
    places, moments = seen.unflatten(1, video), heard.unflatten(1, sound)
    return places.flatten(2).transpose(1, 2), moments.transpose(1, 2).flatten(2)


def _state(seen: Tensor, heard: Tensor, video: Shape, sound: Shape) -> Tensor:
    """The inverse."""
    sounds = heard.unflatten(2, (sound[0], sound[2])).transpose(1, 2)
    return torch.cat([seen.transpose(1, 2).flatten(1), sounds.flatten(1)], 1)
