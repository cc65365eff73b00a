"""Lumina-Image 2.0: Lumina2Transformer2DModel on latents, told 1 - t; what it returns is x0 - eps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.shift import shift_of
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import MaskedTextFamily, TransformerFamily
from stepdistill.families.size import Size


class Lumina2(MaskedTextFamily):
    name = "Lumina-Image 2.0"
    pipelines = ("Lumina2Pipeline",)
    clock = "t"
    passes = frozenset({"sigmas", "mu"})
    keeps_length = True  # along the width of a picture, as its call does it
    blocks = "layers"
    encoding = ("max_sequence_length",)  # and an instruction before prompts, but not before none
    lora_targets = (*TransformerFamily.lora_targets, *(f"feed_forward.linear_{i}" for i in (1, 2, 3)))

    def default_size(self, pipe: Any) -> Size:
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return Size(side, side)

    def shift(self, pipe: Any, tokens: int) -> float:
        # Its call takes the channels of its latents for the number of tokens, so that all sizes have one shift.
        return shift_of(pipe.scheduler, pipe.transformer.config.in_channels)

    def call(self, net: Any, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        output: Tensor = net(
            hidden_states=x_t,
            timestep=1 - time,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_attention_mask=cond["encoder_attention_mask"],
            return_dict=False,
        )[0]
        return -output

    # A picture's tokens stand behind its prompt's, which are of a length of their own: they are looked at before the
    # blocks that see both.

    def features_of(self, net: Any) -> torch.nn.Module:
        refiner: torch.nn.Module = net.noise_refiner[-1]
        return refiner

    def feature_layers(self, net: Any) -> list[torch.nn.Module]:
        return list(net.noise_refiner)

    def feature_shape(self, net: Any, state: tuple[int, ...]) -> tuple[int, int, int]:
        return int(net.config.hidden_size), state[-2] // self.patch(net), state[-1] // self.patch(net)
