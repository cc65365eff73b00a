"""DiT: class-conditional transformer on latents, with a learned variance that students do not use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.families.condition import Condition
from stepdistill.families.kinds import LabelFamily, TransformerFamily
from stepdistill.families.size import Size


class DiT(LabelFamily, TransformerFamily):
    name = "DiT"
    pipelines = ("DiTPipeline",)

    def classes(self, pipe: Any) -> int:
        return int(pipe.transformer.config.num_embeds_ada_norm)

    def label_of(self, pipe: Any, prompt: str) -> int:
        named = getattr(pipe, "labels", {})
        return int(named[prompt]) if prompt in named else super().label_of(pipe, prompt)

    def pixels(self, pipe: Any) -> int:
        return int(2 ** (len(pipe.vae.config.block_out_channels) - 1))

    def call_arguments(
        self, pipeline: str, prompts: list[str], guidance: float | None, size: Size | None
    ) -> dict[str, Any]:
        return {
            "class_labels": [int(prompt) for prompt in prompts],
            "guidance_scale": guidance or self.guidance_off,
        }

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        output: Tensor = net(x_t, timestep=time, class_labels=cond["class_labels"], return_dict=False)[0]
        return output[:, : x_t.shape[1]]

    def null(self, pipe: Any, size: Size) -> Condition | None:
        # The label table holds one row more than there are classes; DiTPipeline uses it as "no class".
        return Condition({"class_labels": torch.tensor([self.classes(pipe)], device=pipe.device)})
