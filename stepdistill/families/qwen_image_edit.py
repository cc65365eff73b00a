"""Qwen-Image-Edit: Qwen-Image on the tokens of a state and, after them, of a picture, which its text encoder sees."""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from stepdistill.families._from_picture import NULL, PICTURE, TokensBehind, pictures_named
from stepdistill.families.condition import Condition, joined
from stepdistill.families.qwen_image import QwenImage
from stepdistill.families.size import Size
from stepdistill.pictures.given import words_of

EMBEDS, EMBEDS_MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
NO_WORDS = " "  # of its model card: an empty text would be no guidance


class QwenImageEdit(TokensBehind, QwenImage):
    name = "Qwen-Image-Edit"
    pipelines = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        pictures = pictures_named(prompts, size)
        rows = zip(pictures, words_of(prompts), strict=True)
        found = joined([self._told(pipe, picture, words) for picture, words in rows])
        return found.with_tensor(PICTURE, self.latents_of(pipe, pictures, size))

    def null(self, pipe: Any, size: Size) -> Condition | None:
        own = self.encode(pipe, [NO_WORDS], size)
        return Condition({name: own[name] for name in (EMBEDS, EMBEDS_MASK)})

    def latents_of(self, pipe: Any, pictures: list[Image], size: Size) -> Tensor:
        area = _stock().VAE_IMAGE_SIZE
        return super().latents_of(pipe, [_resized(pipe, picture, area) for picture in pictures], size)

    def shape_of(self, pipe: Any, size: Size) -> tuple[int, ...]:
        return self.state_shape(pipe, _at_area(size, _stock().VAE_IMAGE_SIZE))

    def _told(self, pipe: Any, picture: Image, words: str) -> Condition:
        """What the text encoder makes of a prompt and its picture, and of no words and that."""
        plus = type(pipe).__name__ == "QwenImageEditPlusPipeline"
        seen = _resized(pipe, picture, _stock().CONDITION_IMAGE_SIZE if plus else _stock().VAE_IMAGE_SIZE)
        found = dict[str, Tensor]()
        for prefix, text in (("", words), (NULL, NO_WORDS)):
            embeds, mask = pipe.encode_prompt([text], [seen] if plus else seen, pipe.device)
            mask = embeds.new_ones(embeds.shape[:2]) if mask is None else mask
            found |= {prefix + EMBEDS: embeds, prefix + EMBEDS_MASK: mask.bool()}
        return Condition(found)

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


def _stock() -> Any:
    """The module of the pipelines that says how many pixels their pictures have."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    return pipeline_qwenimage_edit_plus


def _at_area(size: Size, area: int) -> Size:
    """The size of so many pixels at the same aspect ratio, as the pipelines round it."""
    width, height = _stock().calculate_dimensions(area, size.width / size.height)
    return Size(height, width)


def _resized(pipe: Any, picture: Image, area: int) -> Image:
    size = _at_area(Size(picture.height, picture.width), area)
    resized: Image = pipe.image_processor.resize(picture, size.height, size.width)
    return resized
