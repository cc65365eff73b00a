"""Flux.1 Kontext: Flux.1 on the tokens of a state and, after them, of the picture that it draws from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.families._from_picture import PICTURE, TokensBehind, pictures_named
from stepdistill.families._packing import grid_ids
from stepdistill.families.condition import GUIDANCE, Condition
from stepdistill.families.flux import Flux
from stepdistill.families.size import Size
from stepdistill.pictures.given import words_of


class FluxKontext(TokensBehind, Flux):
    name = "Flux.1 Kontext"
    pipelines = ("FluxKontextPipeline",)

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        latents = self.latents_of(pipe, pictures_named(prompts, size), size)
        return super().encode(pipe, words_of(prompts), size).with_tensor(PICTURE, latents)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        tokens, ids = self.pack(x_t), grid_ids(x_t)
        embeds, of_picture = cond["encoder_hidden_states"], ids.new_tensor([1, 0, 0])
        output: Tensor = net(
            hidden_states=torch.cat([tokens, self.pack(cond[PICTURE]).to(tokens)], 1),
            timestep=time,
            guidance=cond.get(GUIDANCE),
            encoder_hidden_states=embeds,
            pooled_projections=cond["pooled_projections"],
            txt_ids=x_t.new_zeros(embeds.shape[1], 3),
            img_ids=torch.cat([ids, ids + of_picture]),
            return_dict=False,
        )[0]
        return self.unpack(output[:, : tokens.shape[1]], tuple(x_t.shape[1:]))

    def call_arguments(
        self, pipeline: str, prompts: list[str], guidance: float | None, size: Size | None
    ) -> dict[str, Any]:
        told = super().call_arguments(pipeline, prompts, guidance, size)
        # Or it draws, and is given, another size of the same aspect ratio, or one of a list.
        return told if size is None else {**told, "max_area": size.height * size.width, "_auto_resize": False}
