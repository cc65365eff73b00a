"""Flux.1 [dev] and [schnell]: FluxTransformer2DModel on packed latents (_packing.py); guidance is an input of [dev]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stepdistill.families._embedded_guidance import EmbeddedGuidance
from stepdistill.families._packing import PackedFamily, grid_ids
from stepdistill.families.condition import GUIDANCE, Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.size import Size


class Flux(PackedFamily):
    name = "Flux.1"
    pipelines = ("FluxPipeline",)
    clock = "t"
    passes = frozenset({"sigmas", "mu"})
    lora_targets = (*TransformerFamily.lora_targets, "proj_mlp")
    changes = EmbeddedGuidance()

    def default_size(self, pipe: Any) -> Size:
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return Size(side, side)

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        embeds, pooled, _ = pipe.encode_prompt(prompts, device=pipe.device)  # T5 pads to its full length
        return Condition({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return None

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        embeds = cond["encoder_hidden_states"]
        output: Tensor = net(
            hidden_states=self.pack(x_t),
            timestep=time,
            guidance=cond.get(GUIDANCE),
            encoder_hidden_states=embeds,
            pooled_projections=cond["pooled_projections"],
            txt_ids=x_t.new_zeros(embeds.shape[1], 3),
            img_ids=grid_ids(x_t),
            return_dict=False,
        )[0]
        return self.unpack(output, tuple(x_t.shape[1:]))
