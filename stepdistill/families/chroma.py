"""Chroma: ChromaTransformer2DModel on packed latents (_packing.py), which is told where prompts end."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stepdistill.families._packing import PackedFamily, grid_ids
from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.size import Size


class Chroma(PackedFamily):
    name = "Chroma"
    pipelines = ("ChromaPipeline",)
    clock = "t"
    passes = frozenset({"sigmas", "mu"})
    lora_targets = (*TransformerFamily.lora_targets, "proj_mlp")

    def default_size(self, pipe: Any) -> Size:
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return Size(side, side)

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        length = call_default(pipe, "max_sequence_length")
        embeds, _, mask, *_ = pipe.encode_prompt(
            prompts, device=pipe.device, do_classifier_free_guidance=False, max_sequence_length=length
        )  # of full length; the first token of the padding is left in
        return Condition({"encoder_hidden_states": embeds, "attention_mask": mask})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        embeds, packed = cond["encoder_hidden_states"], self.pack(x_t)
        output: Tensor = net(
            hidden_states=packed,
            timestep=time,
            encoder_hidden_states=embeds,
            txt_ids=x_t.new_zeros(embeds.shape[1], 3),
            img_ids=grid_ids(x_t),
            attention_mask=nn.functional.pad(cond["attention_mask"], (0, packed.shape[1]), value=1),
            return_dict=False,
        )[0]
        return self.unpack(output, tuple(x_t.shape[1:]))
