"""HunyuanDiT: HunyuanDiT2DModel on latents, with a v and a variance as its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepdistill.families.condition import GAP, Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.size import Size

LENGTHS = (77, 256)
"""Tokens of its two encoders, as its call has them."""


class HunyuanDiT(TransformerFamily):
    name = "HunyuanDiT"
    pipelines = ("HunyuanDiTPipeline",)
    passes = frozenset({"generator"})
    blocks = "blocks"

    def unit(self, pipe: Any) -> int:
        return max(16, super().unit(pipe))  # written in its call

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        tensors = dict[str, Tensor]()
        for i, end in enumerate(("", "_t5")):
            embeds, _, mask, _ = pipe.encode_prompt(
                prompts,
                device=pipe.device,
                do_classifier_free_guidance=False,
                max_sequence_length=LENGTHS[i],
                text_encoder_index=i,
            )
            tensors |= {f"encoder_hidden_states{end}": embeds, f"text_embedding_mask{end}": mask}
        sides = [1024, 1024, size.height, size.width, 0, 0]  # of the original, of the target, no crop
        return Condition({**tensors, "image_meta_size": embeds.new_tensor([sides]).expand(len(prompts), -1)})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: Any, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        patch = self.patch(net)
        grid, base = (x_t.shape[2] // patch, x_t.shape[3] // patch), 512 // 8 // patch
        rope = get_2d_rotary_pos_embed(
            net.inner_dim // net.num_heads,
            get_resize_crop_region_for_grid(grid, base),
            grid,
            device=x_t.device,
            output_type="pt",
        )
        # It looks at the sizes as one row.
        told = {name: value.contiguous() for name, value in cond.tensors.items() if name != GAP}
        output: Tensor = net(
            x_t,
            time,
            **told,
            style=torch.zeros(len(x_t), dtype=torch.long, device=x_t.device),
            image_rotary_emb=rope,
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    def call_arguments(
        self, pipeline: str, prompts: list[str], guidance: float | None, size: Size | None
    ) -> dict[str, Any]:
        # Binning would draw at the nearest of the sizes it was trained at.
        return {**super().call_arguments(pipeline, prompts, guidance, size), "use_resolution_binning": False}
