"""Transformers that take guidance as an input, whose embedding they add to that of the time (Flux, HunyuanVideo)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stepdistill.families.network_changes import NetworkChanges


class EmbeddedGuidance(NetworkChanges):
    """A student has its teacher's scale folded in, and takes none."""

    def takes_guidance(self, net: Any) -> bool:
        return bool(net.config.guidance_embeds)

    @torch.no_grad()
    def fold_guidance(self, net: Any, guidance: float) -> nn.Module:
        # Both embeddings are added up, so that of a constant scale is a constant in the bias of the timestep's.
        embedder = net.time_text_embed
        plain = type(net).from_config(net.config, guidance_embeds=False)
        added = "time_text_embed.guidance_embedder."
        plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith(added)})
        phase = embedder.time_proj(torch.tensor([1000 * guidance], device=net.device))
        plain.to(net.device).time_text_embed.timestep_embedder.linear_2.bias += embedder.guidance_embedder(
            phase
        )[0]
        return plain.train(net.training)  # type: ignore[no-any-return]
