"""SANA-Sprint: SANA's network on TrigFlow, distilled to one to four steps, with guidance as an input.

Chen et al. 2025, 2503.09641. Its network is one of a straight path, and is called as that: at a state of TrigFlow's
path, of angle a, it is told the straight path's time u = sin a / (sin a + cos a), handed the state there with the same
ratio of noise to data, and its velocity is turned into TrigFlow's output, v = cos a eps - sin a x0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.diffusion.path import Path, per_sample
from stepdistill.diffusion.remembered import remembered
from stepdistill.errors import UserError
from stepdistill.families._embedded_guidance import EmbeddedGuidance
from stepdistill.families.base import call_default
from stepdistill.families.condition import GUIDANCE, Condition
from stepdistill.families.plain_calls import of_count
from stepdistill.families.sana import Sana
from stepdistill.families.size import Size

SIGMA_DATA = 0.5
"""The deviation of its scheduler's states; ours have 1."""


class SprintChanges(EmbeddedGuidance):
    """Its pipeline hands the network a scale in any case: a student keeps the input, and hears a constant there."""

    @torch.no_grad()
    def fold_guidance(self, net: Any, guidance: float) -> nn.Module:
        embedder = net.time_embed.guidance_embedder
        scale = torch.tensor([guidance * net.config.guidance_embeds_scale], device=net.device)
        said = embedder(net.time_embed.guidance_condition_proj(scale).to(embedder.linear_1.weight.dtype))[0]
        # All but the last bias is zero, and gets gradients of zero: the scale is not heard, nor learnt again.
        for value in embedder.parameters():
            value.zero_()
        embedder.linear_2.bias.copy_(said)
        return net  # type: ignore[no-any-return]


class SanaSprint(Sana):
    name = "SANA-Sprint"
    pipelines = ("SanaSprintPipeline",)
    changes = SprintChanges()

    def adopt(self, pipe: Any) -> None:
        if (found := pipe.scheduler.config.get("sigma_data", SIGMA_DATA)) != SIGMA_DATA:
            raise UserError(
                f"the teacher's scheduler has sigma_data {found:g}, and a SanaSprintPipeline draws with {SIGMA_DATA}: "
                "set that in its config"
            )

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        own = {name: call_default(pipe, name) for name in self.encoding}
        embeds, mask = pipe.encode_prompt(prompts, device=pipe.device, **own)
        return Condition({"encoder_hidden_states": embeds, "encoder_attention_mask": mask})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return None

    @remembered
    def time(self, path: Path, t: Tensor) -> Tensor:
        angle = path.angle(t.float())
        sine, cosine = torch.sin(angle), torch.cos(angle)
        return sine / (sine + cosine)

    def call(self, net: Any, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        guidance = cond.get(GUIDANCE)
        u = per_sample(time, x_t)
        length = torch.sqrt(u.square() + (1 - u).square())
        state = x_t * length
        output: Tensor = net(
            state.to(x_t.dtype),
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_attention_mask=cond["encoder_attention_mask"],
            guidance=(torch.zeros_like(time) if guidance is None else guidance)
            * net.config.guidance_embeds_scale,
            timestep=time,
            return_dict=False,
        )[0]
        return ((1 - 2 * u) * state + (1 - 2 * u + 2 * u.square()) * output) / length

    def pack(self, x_t: Tensor) -> Tensor:
        return x_t * SIGMA_DATA

    def unpack(self, packed: Tensor, state: tuple[int, ...]) -> Tensor:
        return packed / SIGMA_DATA

    def grid_arguments(self, steps: int) -> dict[str, Any]:
        return of_count(steps)
