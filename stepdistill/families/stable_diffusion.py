"""Stable Diffusion 1.x and 2.x, and SDXL: UNet2DConditionModel on latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families._slim_unet import slim_unet
from stepdistill.families.base import GAP_SCALE, Family
from stepdistill.families.condition import Condition

GUIDANCE_DIM = 256
"""Width of the guidance embedding in LCM (Luo et al. 2023, 2310.04378)."""

GAP_DIM = 128
"""Width of the second time's embedding; another width than that of guidance, so that a network says which it takes."""


class StableDiffusion(Family):
    name = "Stable Diffusion 1.x / 2.x"
    pipelines = ("StableDiffusionPipeline",)

    def call(self, net: nn.Module, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        output: Tensor = net(
            x_t,
            timestep,
            encoder_hidden_states=cond.tensors["encoder_hidden_states"],
            timestep_cond=self.time_condition(net, x_t, cond),
            added_cond_kwargs=self.added_conditions(cond),
            return_dict=False,
        )[0]
        return output

    def time_condition(self, net: nn.Module, x_t: Tensor, cond: Condition) -> Tensor | None:
        """What goes into the slot beside the timestep: the embedded length of a jump, or an embedded guidance."""
        if self.has_second_time(net):
            return _sinusoid(GAP_SCALE * self.gap_of(x_t, cond), GAP_DIM)
        return cond.tensors.get("guidance_embedding")

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

    def feature_shape(self, net: Any) -> tuple[int, int, int]:
        halvings = sum(block.downsamplers is not None for block in net.down_blocks)
        height, width = (-(-size // 2**halvings) for size in self.size_of(net))
        return int(net.config.block_out_channels[-1]), height, width

    def slimmer(self, net: nn.Module, width: float, depth: float) -> nn.Module:
        return slim_unet(net, width, depth)

    def guidance_input(self, net: nn.Module) -> nn.Module:
        return _with_time_condition(net, GUIDANCE_DIM)

    def embed_guidance(self, net: Any, guidance: Tensor) -> Tensor:
        """Sinusoid of 1000 (g - 1), identical to the pipeline's ``get_guidance_scale_embedding``."""
        width = net.config.time_cond_proj_dim or GUIDANCE_DIM
        return _sinusoid(1000 * (guidance.float() - 1), width)

    def takes_guidance(self, net: Any) -> bool:
        return net.config.time_cond_proj_dim is not None and not self.has_second_time(net)

    def fold_guidance(self, net: Any, guidance: float) -> nn.Module:
        return _folded(net, self.embed_guidance(net, torch.tensor([guidance], device=net.device)))

    def has_second_time(self, net: Any) -> bool:
        return bool(net.config.time_cond_proj_dim == GAP_DIM)

    def second_time(self, net: Any) -> nn.Module:
        """Through the slot for a condition beside the timestep, the one LCM has for its guidance."""
        if net.config.time_cond_proj_dim is not None:
            raise UserError(
                "this method needs a network with a second time, and this UNet2DConditionModel has its one slot taken "
                f"by a guidance embedding of {net.config.time_cond_proj_dim}: take a teacher without one"
            )
        return _with_time_condition(net, GAP_DIM)

    def fold_second_time(self, net: Any, gap: float) -> nn.Module:
        return _folded(net, _sinusoid(torch.tensor([GAP_SCALE * gap], device=net.device), GAP_DIM))


@torch.no_grad()
def _folded(net: Any, condition: Tensor) -> nn.Module:
    """A copy without the condition beside the timestep that equals the network under ``condition`` [1, D]."""
    plain = type(net).from_config(net.config, time_cond_proj_dim=None)
    added = "time_embedding.cond_proj.weight"
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != added})
    # cond_proj adds to the input of linear_1, so a constant there is a constant in linear_1's bias.
    shift = net.time_embedding.cond_proj(condition) @ net.time_embedding.linear_1.weight.T
    plain.to(net.device).time_embedding.linear_1.bias += shift[0]
    return plain.train(net.training)  # type: ignore[no-any-return]


def _with_time_condition(net: Any, width: int) -> nn.Module:
    """A copy with a condition of this width beside the timestep, of no effect at the start."""
    # As a keyword: from_config drops a key of its first argument that the network had by default.
    wider = type(net).from_config(net.config, time_cond_proj_dim=width)
    wider.load_state_dict({**wider.state_dict(), **net.state_dict()})
    torch.nn.init.zeros_(wider.time_embedding.cond_proj.weight)
    return wider.to(net.device).train(net.training)  # type: ignore[no-any-return]


def _sinusoid(phase: Tensor, width: int) -> Tensor:
    """Sines and cosines [B, width] of phase [B] at rates from 1 down to 1 / 10000."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=phase.device) * -(torch.log(torch.tensor(1e4)) / (half - 1)))
    angle = phase[:, None] * rates[None]
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)


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
