"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel with a flow-matching path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepdistill.attention.repeated_token import RepeatedLastToken
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.size import Size

COUNTS = "last_token_counts"
"""The condition that says how many equal tokens the last one stands for, [B]; what the attention processor is told."""


class StableDiffusion3(TransformerFamily):
    name = "Stable Diffusion 3"
    pipelines = ("StableDiffusion3Pipeline",)

    def adopt(self, pipe: Any) -> None:
        pipe.transformer.set_attn_processor(RepeatedLastToken())

    def call(self, net: Any, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        states, counts = cond["encoder_hidden_states"], cond.get(COUNTS)
        told = {} if counts is None else {COUNTS: counts}
        if counts is not None and not isinstance(net.transformer_blocks[0].attn.processor, RepeatedLastToken):
            # For a processor that counts every token once.
            repeated = states[:, -1:].expand(-1, int(counts[0]), -1)
            states, told = torch.cat([states[:, :-1], repeated], 1), {}
        output: Tensor = net(
            hidden_states=x_t,
            timestep=time,
            encoder_hidden_states=states,
            pooled_projections=cond["pooled_projections"],
            joint_attention_kwargs=told,
            return_dict=False,
        )[0]
        return output

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        states, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, device=pipe.device, do_classifier_free_guidance=False
        )
        last = states[:, -1:]
        if (states[:, pipe.tokenizer_max_length :] == last).all():  # no T5: its tokens are alike
            count = states.shape[1] - pipe.tokenizer_max_length
            states = torch.cat([states[:, : pipe.tokenizer_max_length], last], 1)
            counts = torch.full((len(states),), count, device=states.device)
            return Condition({"encoder_hidden_states": states, "pooled_projections": pooled, COUNTS: counts})
        return Condition({"encoder_hidden_states": states, "pooled_projections": pooled})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)
