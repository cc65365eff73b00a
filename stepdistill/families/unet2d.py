"""Unconditional and class-conditional UNet2DModel on pixels (DDPM, DDIM, consistency model pipelines)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stepdistill.families.base import LabelFamily
from stepdistill.types import Condition


class UNet2D(LabelFamily):
    name = "unconditional or class-conditional UNet2DModel"
    pipelines = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")

    def student_pipeline(self, pipe: Any) -> str | None:
        # DDIMPipeline turns every scheduler into DDIM, and DDPMPipeline passes no class labels.
        return "ConsistencyModelPipeline" if self.classes(pipe) else "DDPMPipeline"

    def call_arguments(self, pipeline: str, prompts: list[str], guidance: float) -> dict[str, Any]:
        if pipeline == "DDPMPipeline":
            return {"batch_size": len(prompts)}
        return {"batch_size": len(prompts), "class_labels": [int(prompt) for prompt in prompts]}

    def classes(self, pipe: Any) -> int:
        return int(pipe.unet.config.num_class_embeds or 0)

    def call(self, net: nn.Module, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        output: Tensor = net(x_t, timestep, class_labels=cond.tensors.get("class_labels"), return_dict=False)[
            0
        ]
        return output[:, : x_t.shape[1]]

    def null(self, pipe: Any) -> Condition | None:
        return None

    def features_of(self, net: nn.Module) -> nn.Module:
        return net.get_submodule("mid_block")

    def feature_width(self, net: Any) -> int:
        return int(net.config.block_out_channels[-1])

    def to_latents(self, pipe: Any, images: Tensor) -> Tensor:
        return images

    def to_images(self, pipe: Any, latents: Tensor) -> Tensor:
        return (latents / 2 + 0.5).clamp(0, 1)
