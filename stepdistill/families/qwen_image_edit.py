"""Qwen-Image-Edit: Qwen-Image on the tokens of a state and, after them, of a picture, which its text encoder sees."""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from stepdistill.families._from_picture import NULL, PICTURE, FromPicture, as_frames, pictures_named
from stepdistill.families.condition import Condition, joined
from stepdistill.families.qwen_image import QwenImage
from stepdistill.families.size import Size
from stepdistill.pictures.given import words_of

EMBEDS, EMBEDS_MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
NO_WORDS = " "  # of its model card: an empty text would be no guidance


class QwenImageEdit(FromPicture, QwenImage):
    name = "Qwen-Image-Edit"
    pipelines = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
    alone = True  # its call takes one prompt

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        rows = zip(pictures_named(prompts, size), words_of(prompts), strict=True)
        return joined([self._one(pipe, picture, words) for picture, words in rows])

    def null(self, pipe: Any, size: Size) -> Condition | None:
        own = self.encode(pipe, [NO_WORDS], size)
        return Condition({name: own[name] for name in (EMBEDS, EMBEDS_MASK)})

    def _one(self, pipe: Any, picture: Image, words: str) -> Condition:
        told, drawn = (self._resized(pipe, picture, area) for area in self._areas(pipe))
        texts = {prefix: self._read(pipe, told, text) for prefix, text in (("", words), (NULL, NO_WORDS))}
        tensors = {
            prefix + name: value for prefix, text in texts.items() for name, value in text.tensors.items()
        }
        return Condition({**tensors, PICTURE: self.to_states(pipe, as_frames([drawn], pipe.device))})

    def _read(self, pipe: Any, picture: Image, words: str) -> Condition:
        """What its text encoder makes of a prompt and the picture."""
        plus = type(pipe).__name__ == "QwenImageEditPlusPipeline"
        embeds, mask = pipe.encode_prompt([words], [picture] if plus else picture, pipe.device)
        mask = embeds.new_ones(embeds.shape[:2]) if mask is None else mask
        return Condition({EMBEDS: embeds, EMBEDS_MASK: mask.bool()})

    def _areas(self, pipe: Any) -> tuple[int, int]:
        """Pixels of the picture for the text encoder, and for the network."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        own = type(pipe).__name__ == "QwenImageEditPlusPipeline"
        return plus.CONDITION_IMAGE_SIZE if own else plus.VAE_IMAGE_SIZE, plus.VAE_IMAGE_SIZE

    def _resized(self, pipe: Any, picture: Image, area: int) -> Image:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

        width, height = calculate_dimensions(area, picture.width / picture.height)
        resized: Image = pipe.image_processor.resize(picture, height, width)
        return resized

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        tokens, picture = self.pack(x_t), cond[PICTURE]
        shapes = [(1, *(side // 2 for side in states.shape[2:])) for states in (x_t, picture)]
        output: Tensor = net(
            hidden_states=torch.cat([tokens, self.pack(picture).to(tokens)], 1),
            timestep=time,
            encoder_hidden_states=cond[EMBEDS],
            encoder_hidden_states_mask=cond[EMBEDS_MASK],
            img_shapes=[shapes] * len(x_t),
            return_dict=False,
        )[0]
        return self.unpack(output[:, : tokens.shape[1]], tuple(x_t.shape[1:]))

    def picture(self, net: nn.Module, output: Any, state: tuple[int, ...]) -> Tensor:
        return super().picture(net, output, state)[:, : self.tokens(net, state)]
