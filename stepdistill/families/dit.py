"""DiT: class-conditional transformer on latents, with a learned variance that students do not use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.families._late_blocks import tell_ends
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import LabelFamily, TransformerFamily
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.families.size import Size


class DiTChanges(NetworkChanges):
    def late_blocks(self, net: Any) -> nn.Module:
        """The last two sevenths of the blocks, as in 2510.24474: 8 of 28. The output layer, there told s, is told t: it
        embeds the time by the first block's weights, and the class with it."""
        blocks = net.transformer_blocks
        late = blocks[round(len(blocks) * 5 / 7) :]
        tell_ends(late, "timestep", (), "timestep_embedder.linear_2")
        return net  # type: ignore[no-any-return]


class DiT(LabelFamily, TransformerFamily):
    name = "DiT"
    pipelines = ("DiTPipeline",)
    changes = DiTChanges()

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
