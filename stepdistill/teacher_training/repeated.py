"""Joint attention in which one token stands for many equal ones.

StableDiffusion3Pipeline without a T5 encoder adds 256 zero tokens to the caption's 24. Nothing tells them
apart (the context has no positions), so they stay equal through every block, and one
of them with 256-fold weight in the softmax, that is with log 256 added to its logits, gives the same result
at a quarter of the cost.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

T5_TOKENS = 256
"""Zero tokens StableDiffusion3Pipeline adds for an absent T5 encoder: its default max_sequence_length."""


class RepeatedLastToken:
    """An attention processor for SD3Transformer2DModel: the last context token counts ``count`` times."""

    def __init__(self, count: int = T5_TOKENS) -> None:
        self.count = count

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states [B, M, D] and encoder_hidden_states [B, L, D] to the same shapes."""
        if encoder_hidden_states is None or attention_mask is not None:
            raise ValueError("RepeatedLastToken is for unmasked joint attention")

        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)  # [B, heads, tokens, D / heads]

        own = [heads(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v)]
        context = [
            heads(p(encoder_hidden_states)) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        ]
        for i, (norm, norm_added) in enumerate(
            ((attn.norm_q, attn.norm_added_q), (attn.norm_k, attn.norm_added_k))
        ):
            own[i] = own[i] if norm is None else norm(own[i])
            context[i] = context[i] if norm_added is None else norm_added(context[i])
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(own, context, strict=True))
        bias = torch.zeros(key.shape[2], dtype=query.dtype, device=query.device)
        bias[-1] = math.log(self.count)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(query.shape[2], -1))
        out = out.transpose(1, 2).flatten(2)  # [B, M + L, D]
        image, text = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)
