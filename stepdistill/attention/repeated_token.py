"""Joint attention in which the last context token stands for many equal ones.

StableDiffusion3Pipeline without a T5 encoder adds 256 zero tokens to the caption's. Nothing tells them apart (the
context has no positions), so they stay equal through every block, and one of them with 256-fold weight in the softmax,
that is with log 256 added to its logits, gives the same result at a fraction of the cost.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor

T5_TOKENS = 256
"""Zero tokens StableDiffusion3Pipeline adds for an absent T5 encoder: its default max_sequence_length."""


class RepeatedLastToken:
    """An attention processor for SD3Transformer2DModel: the last context token counts as many times as it is told.

    Args:
        count: how often where the call does not say; None leaves such calls to diffusers' own processor.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count
        self.plain = JointAttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        last_token_counts: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states [B, M, D] and encoder_hidden_states [B, L, D] to the same shapes; counts [B]."""
        if last_token_counts is None and self.count is not None and encoder_hidden_states is not None:
            last_token_counts = hidden_states.new_full((hidden_states.shape[0],), self.count)
        if last_token_counts is None or encoder_hidden_states is None:
            inputs: Any = (hidden_states, encoder_hidden_states, attention_mask)
            plain: Tensor | tuple[Tensor, Tensor] = self.plain(attn, *inputs)
            return plain

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
        bias = query.new_zeros(query.shape[0], 1, 1, key.shape[2])
        bias[:, 0, 0, -1] = last_token_counts.to(query.dtype).log()
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2)  # [B, M + L, D]
        image, text = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)
