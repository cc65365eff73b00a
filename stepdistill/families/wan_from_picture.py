"""Wan 2.1 and 2.2 that draw a video from its first frame.

Its latents and a mask are further channels of a state; or, where a pipeline says ``expand_timesteps`` (Wan 2.2 5B),
they stand in the state's own first frame, whose tokens are told the time 0. What the network says of that frame is
nothing, and its pipeline puts the picture in its place at the end: here the output there is the one velocity that ends
in it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from PIL.Image import Image
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

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        return int(pipe.vae.config.z_dim), *super().state_shape(pipe, size)[1:]

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        _check_reader()
        pictures = pictures_named(prompts, size)
        latents = self.latents_of(pipe, pictures, size)
        found = super().encode(pipe, words_of(prompts), size).with_tensor(PICTURE, latents)
        if pipe.transformer.config.image_dim is None:
            return found
        seen = [pipe.encode_image(picture, pipe.device) for picture in pictures]
        return found.with_tensor(SEEN, torch.cat(seen))

    def latents_of(self, pipe: Any, pictures: list[Image], size: Size) -> Tensor:
        """Those of the video that is grey after the picture, below channels that say where it stands; or its own, of
        one frame."""
        sides = {"height": size.height, "width": size.width, "num_frames": size.frames}
        given = {
            "dtype": torch.float32,
            "device": pipe.device,
            "latents": torch.zeros(1),
        }  # or it would draw noise
        frames = as_frames(pictures, pipe.device)
        return torch.cat([pipe.prepare_latents(frame, 1, **sides, **given)[1] for frame in frames])

    def shape_of(self, pipe: Any, size: Size) -> tuple[int, ...]:
        channels, frames, *sides = self.state_shape(pipe, size)
        if pipe.config.get("expand_timesteps"):
            return channels, 1, *sides
        return self.stride(pipe) + channels, frames, *sides

    def null(self, pipe: Any, size: Size) -> Condition | None:
        _check_reader()
        return super().encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        picture = cond[PICTURE].to(x_t)
        inside = picture.shape[1] == x_t.shape[1]  # else it has the channels of the mask too
        states = torch.cat([picture, x_t[:, :, 1:]], 2) if inside else torch.cat([x_t, picture], 1)
        output: Tensor = net(
            hidden_states=states,
            timestep=self._of_tokens(net, x_t, time) if inside else time,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_hidden_states_image=cond.get(SEEN),
            return_dict=False,
        )[0]
        if not inside:
            return output
        t = (time / 1000).view(-1, 1, 1, 1, 1).to(x_t)
        return torch.cat([((x_t[:, :, :1] - picture) / t).to(output), output[:, :, 1:]], 2)

    def _of_tokens(self, net: Any, x_t: Tensor, time: Tensor) -> Tensor:
        """The time of each token [B, N]: 0 for those of the first frame."""
        frames = x_t.shape[2]
        told = time[:, None] * (torch.arange(frames, device=time.device) > 0)
        return told.repeat_interleave(self.tokens(net, tuple(x_t.shape)) // frames, 1)


def _check_reader() -> None:
    """Its pipeline reads prompts with a package that diffusers does not bring."""
    if importlib.util.find_spec("ftfy") is None:
        raise UserError(
            "a WanImageToVideoPipeline reads prompts with ftfy, which is not installed: pip install ftfy"
        )
