"""Wan 2.1 and 2.2 that draw a video from its first frame: its latents and a mask are further channels of a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families._from_picture import PICTURE, FromPicture, as_frames, pictures_named
from stepdistill.families.condition import Condition
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.families.size import Size
from stepdistill.families.wan import Wan
from stepdistill.pictures.given import words_of

SEEN = "encoder_hidden_states_image"
"""What CLIP makes of the picture, which Wan 2.1's network is told too."""


class WanFromPicture(FromPicture, Wan):
    name = "Wan 2.1, Wan 2.2 from a picture"
    pipelines = ("WanImageToVideoPipeline",)
    changes = NetworkChanges()
    of_picture = frozenset({PICTURE, SEEN})
    alone = True  # its call takes one picture

    def adopt(self, pipe: Any) -> None:
        if pipe.config.get("expand_timesteps"):
            raise UserError(
                "this WanImageToVideoPipeline puts its picture in place of a state's first frame (expand_timesteps, Wan "
                "2.2 5B), which no family here does: take Wan 2.1 or Wan 2.2 A14B, or load it as a WanPipeline, which "
                "draws from text"
            )
        super().adopt(pipe)

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        return int(pipe.vae.config.z_dim), *super().state_shape(pipe, size)[1:]

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        pictures = pictures_named(prompts, size)
        latents = [self._picture(pipe, frame, size) for frame in as_frames(pictures, pipe.device)]
        found = super().encode(pipe, words_of(prompts), size).with_tensor(PICTURE, torch.cat(latents))
        if pipe.transformer.config.image_dim is None:
            return found
        seen = [pipe.encode_image(picture, pipe.device) for picture in pictures]
        return found.with_tensor(SEEN, torch.cat(seen))

    def _picture(self, pipe: Any, frame: Tensor, size: Size) -> Tensor:
        """The further channels [1, C, F, H, W] of a frame [1, 3, H, W]: where it stands, and the latents of the video
        that is grey after it."""
        state = torch.zeros(1, *self.state_shape(pipe, size), device=pipe.device)  # or it would draw noise
        _, beside = pipe.prepare_latents(
            frame,
            1,
            len(state[0]),
            size.height,
            size.width,
            size.frames,
            torch.float32,
            pipe.device,
            latents=state,
        )
        found: Tensor = beside
        return found

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return super().encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        output: Tensor = net(
            hidden_states=torch.cat([x_t, cond[PICTURE].to(x_t)], 1),
            timestep=time,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_hidden_states_image=cond.get(SEEN),
            return_dict=False,
        )[0]
        return output
