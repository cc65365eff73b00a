"""Z-Image: ZImageTransformer2DModel on lists of latents and of prompts; what it returns is x0 - eps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.size import Size


class ZImage(TransformerFamily):
    name = "Z-Image"
    pipelines = ("ZImagePipeline",)
    clock = "t"
    passes = frozenset({"sigmas", "mu"})
    blocks = "layers"
    lora_targets = (*TransformerFamily.lora_targets, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    def patch(self, net: Any) -> int:
        return 2  # of the sizes that there may be, the one its forward takes by default

    def default_size(self, pipe: Any) -> Size:
        return Size(1024, 1024)  # written in its call

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        length = call_default(pipe, "max_sequence_length")
        embeds, _ = pipe.encode_prompt(list(prompts), pipe.device, False, max_sequence_length=length)
        padded = pad_sequence(embeds, batch_first=True)
        lengths = torch.tensor([len(each) for each in embeds], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return Condition({"cap_feats": padded, "cap_feats_mask": mask})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        lengths = cond["cap_feats_mask"].sum(1).tolist()
        prompts = [each[:length] for each, length in zip(cond["cap_feats"], lengths, strict=True)]
        output = net([each[:, None] for each in x_t], 1 - time, prompts, return_dict=False)[0]
        return -torch.stack(output)[:, :, 0]

    def feature_shape(self, net: Any, state: tuple[int, ...]) -> tuple[int, int, int]:
        return int(net.config.dim), state[-2] // self.patch(net), state[-1] // self.patch(net)

    def picture(self, net: Any, output: Any, state: tuple[int, ...]) -> Tensor:
        tokens: Tensor = output[:, : self.tokens(net, state)]  # before the prompt's
        return tokens
