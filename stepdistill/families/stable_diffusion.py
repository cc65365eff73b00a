"""Stable Diffusion 1.x and 2.x, SDXL and Kolors: UNet2DConditionModel on latents."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.families._unet_condition_changes import UNetConditionChanges
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import UNetFamily
from stepdistill.families.size import Size

CHANGES = UNetConditionChanges()


class StableDiffusion(UNetFamily):
    name = "Stable Diffusion 1.x / 2.x"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    changes = CHANGES

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        output: Tensor = net(
            x_t,
            time,
            encoder_hidden_states=cond["encoder_hidden_states"],
            timestep_cond=CHANGES.time_condition(net, x_t, cond),
            **self.added_conditions(cond),
            return_dict=False,
        )[0]
        return output

    def added_conditions(self, cond: Condition) -> dict[str, Any]:
        """Arguments of the UNet besides the prompt's tokens; none for 1.x and 2.x."""
        return {}

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        embeds, _ = pipe.encode_prompt(prompts, pipe.device, 1, False)
        return Condition({"encoder_hidden_states": embeds})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)


class StableDiffusionXL(StableDiffusion):
    name = "SDXL, Kolors"
    pipelines = ("StableDiffusionXLPipeline", "KolorsPipeline")
    size_conditions = frozenset({"time_ids"})

    def added_conditions(self, cond: Condition) -> dict[str, Any]:
        return {"added_cond_kwargs": {name: cond[name] for name in ("text_embeds", "time_ids")}}

    @staticmethod
    def _condition(embeds: Tensor, pooled: Tensor, size: Size) -> Condition:
        sides = (size.height, size.width)  # of the original, no crop, and of the target
        ids = torch.tensor([[*sides, 0, 0, *sides]], dtype=embeds.dtype, device=embeds.device)
        return Condition(
            {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": ids.expand(len(embeds), -1)}
        )

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, device=pipe.device, do_classifier_free_guidance=False
        )
        return self._condition(embeds, pooled, size)

    def null(self, pipe: Any, size: Size) -> Condition | None:
        # The pipeline decides what "no prompt" is: zeros or the empty string, by force_zeros_for_empty_prompt.
        _, embeds, _, pooled = pipe.encode_prompt("", device=pipe.device, do_classifier_free_guidance=True)
        return self._condition(embeds, pooled, size)
