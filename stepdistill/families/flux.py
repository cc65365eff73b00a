"""Flux.1 [dev] and [schnell]: FluxTransformer2DModel on packed latents (_packing.py); guidance is an input of [dev]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.families._packing import PackedFamily, grid_ids
from stepdistill.families.condition import GUIDANCE, Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.families.size import Size


class FluxChanges(NetworkChanges):
    def takes_guidance(self, net: Any) -> bool:
        return bool(net.config.guidance_embeds)

    @torch.no_grad()
    def fold_guidance(self, net: Any, guidance: float) -> nn.Module:
        # Both embeddings are added up, so that of a constant scale is a constant in the bias of the timestep's.
        embedder = net.time_text_embed
        plain = type(net).from_config(net.config, guidance_embeds=False)
        added = "time_text_embed.guidance_embedder."
        plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith(added)})
        phase = embedder.time_proj(torch.tensor([1000 * guidance], device=net.device))
        plain.to(net.device).time_text_embed.timestep_embedder.linear_2.bias += embedder.guidance_embedder(
            phase
        )[0]
        return plain.train(net.training)  # type: ignore[no-any-return]


class Flux(PackedFamily):
    name = "Flux.1"
    pipelines = ("FluxPipeline",)
    clock = "t"
    passes = frozenset({"sigmas", "mu"})
    lora_targets = (*TransformerFamily.lora_targets, "proj_mlp")
    changes = FluxChanges()

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
