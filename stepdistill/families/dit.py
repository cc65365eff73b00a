"""DiT: class-conditional transformer on latents, with a learned variance that students do not use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.families.base import TRANSFORMER_LORA, LabelFamily
from stepdistill.families.condition import Condition


class DiT(LabelFamily):
    name = "DiT"
    pipelines = ("DiTPipeline",)
    denoiser = "transformer"
    lora_targets = TRANSFORMER_LORA
    passes_generator = False

    def classes(self, pipe: Any) -> int:
        return int(pipe.transformer.config.num_embeds_ada_norm)

    def label_of(self, pipe: Any, prompt: str) -> int:
        named = getattr(pipe, "labels", {})
        return int(named[prompt]) if prompt in named else super().label_of(pipe, prompt)

    def call_arguments(self, pipeline: str, prompts: list[str], guidance: float) -> dict[str, Any]:
        return {"class_labels": [int(prompt) for prompt in prompts], "guidance_scale": guidance}

    def call(self, net: nn.Module, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        labels = cond.tensors["class_labels"]
        output: Tensor = net(x_t, timestep=timestep, class_labels=labels, return_dict=False)[0]
        return output[:, : x_t.shape[1]]

    def null(self, pipe: Any) -> Condition | None:
        # The label table holds one row more than there are classes; DiTPipeline uses it as "no class".
        return Condition({"class_labels": torch.tensor([self.classes(pipe)], device=pipe.device)})

    def features_of(self, net: nn.Module) -> nn.Module:
        blocks = net.get_submodule("transformer_blocks")
        return net.get_submodule(f"transformer_blocks.{len(list(blocks.children())) // 2}")

    def feature_shape(self, net: Any) -> tuple[int, int, int]:
        height, width = (size // net.config.patch_size for size in self.size_of(net))
        return int(net.config.num_attention_heads * net.config.attention_head_dim), height, width
