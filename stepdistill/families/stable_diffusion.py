"""Stable Diffusion 1.x and 2.x, and SDXL: UNet2DConditionModel on latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.types import Condition

GUIDANCE_DIM = 256
"""Width of the guidance embedding in LCM (Luo et al. 2023, 2310.04378)."""


class StableDiffusion(Family):
    name = "Stable Diffusion 1.x / 2.x"
    pipelines = ("StableDiffusionPipeline",)

    def call(self, net: nn.Module, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        output: Tensor = net(
            x_t,
            timestep,
            encoder_hidden_states=cond.tensors["encoder_hidden_states"],
            timestep_cond=cond.tensors.get("guidance_embedding"),
            added_cond_kwargs=self.added_conditions(cond),
            return_dict=False,
        )[0]
        return output

    def added_conditions(self, cond: Condition) -> dict[str, Tensor] | None:
        """What the UNet is told besides the prompt's tokens; nothing for 1.x and 2.x."""
        return None

    def encode(self, pipe: Any, prompts: list[str]) -> Condition:
        embeds, _ = pipe.encode_prompt(prompts, pipe.device, 1, False)
        return Condition({"encoder_hidden_states": embeds})

    def null(self, pipe: Any) -> Condition | None:
        return self.encode(pipe, [""])

    def features_of(self, net: nn.Module) -> nn.Module:
        return net.get_submodule("mid_block")

    def feature_width(self, net: Any) -> int:
        return int(net.config.block_out_channels[-1])

    def guidance_input(self, net: nn.Module) -> nn.Module:
        from diffusers import UNet2DConditionModel

        from stepdistill.student import lora_layers

        assert isinstance(net, UNet2DConditionModel)
        if lora_layers(net):
            raise UserError(
                "options.guidance_range adds weights that a LoRA cannot hold: set student.lora_rank=0, or use one "
                "fixed options.guidance"
            )
        # As a keyword: from_config drops a key of its first argument that the network had by default.
        wider: Any = UNet2DConditionModel.from_config(net.config, time_cond_proj_dim=GUIDANCE_DIM)
        wider.load_state_dict({**wider.state_dict(), **net.state_dict()})
        torch.nn.init.zeros_(wider.time_embedding.cond_proj.weight)
        widened: nn.Module = wider.to(net.device).train(net.training)
        return widened

    def embed_guidance(self, net: nn.Module, guidance: Tensor) -> Tensor:
        """Sinusoid of 1000 (g - 1), identical to the pipeline's ``get_guidance_scale_embedding``."""
        half = GUIDANCE_DIM // 2
        rates = torch.exp(
            torch.arange(half, device=guidance.device) * -(torch.log(torch.tensor(1e4)) / (half - 1))
        )
        phase = 1000 * (guidance.float() - 1)[:, None] * rates[None]
        return torch.cat([torch.sin(phase), torch.cos(phase)], dim=1)


class StableDiffusionXL(StableDiffusion):
    name = "SDXL"
    pipelines = ("StableDiffusionXLPipeline",)

    def added_conditions(self, cond: Condition) -> dict[str, Tensor] | None:
        return {name: cond.tensors[name] for name in ("text_embeds", "time_ids")}

    def _condition(self, pipe: Any, embeds: Tensor, pooled: Tensor) -> Condition:
        _, height, width = self.latent_shape(pipe)
        size = (height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=embeds.dtype, device=embeds.device)
        return Condition(
            {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": ids.expand(len(embeds), -1)}
        )

    def encode(self, pipe: Any, prompts: list[str]) -> Condition:
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, device=pipe.device, do_classifier_free_guidance=False
        )
        return self._condition(pipe, embeds, pooled)

    def null(self, pipe: Any) -> Condition | None:
        # The pipeline decides what "no prompt" is: zeros or the empty string, by force_zeros_for_empty_prompt.
        _, embeds, _, pooled = pipe.encode_prompt("", device=pipe.device, do_classifier_free_guidance=True)
        return self._condition(pipe, embeds, pooled)
