"""CogView4: CogView4Transformer2DModel with a flow-matching path, whose clock does not know of its time shift."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.diffusion.path import FlowPath, Path
from stepdistill.diffusion.shift import shift_of, shifted
from stepdistill.families._lengths import length_by_length, padded
from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.size import Size


class CogView4(TransformerFamily):
    name = "CogView4"
    pipelines = ("CogView4Pipeline",)
    passes = frozenset({"sigmas", "timesteps", "mu"})
    alone = True
    picture_tokens = 0

    def shift(self, pipe: Any, tokens: int) -> float:
        config = pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return shift_of(pipe.scheduler, tokens)
        from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

        low, high = config.get("base_shift", 0.25), config.get("max_shift", 0.75)
        mu = float(calculate_shift(tokens, config.get("base_image_seq_len", 256), low, high))
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def clock_shift(self, pipe: Any, tokens: int) -> float:
        # A student's travelling scheduler has its grid apart from the clock, which stays the teacher's.
        return float(pipe.scheduler.config.get("clock_shift", self.shift(pipe, tokens)))

    def time(self, path: Path, t: Tensor) -> Tensor:
        if not isinstance(path, FlowPath):
            return super().time(path, t)
        return (1000 * shifted(t.double(), 1 / path.clock_shift)).float()

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        # Alone, as the encoder reads what pads a prompt to the longest of several.
        length = call_default(pipe, "max_sequence_length")
        rows = [
            pipe.encode_prompt([prompt], None, False, device=pipe.device, max_sequence_length=length)[0][0]
            for prompt in prompts
        ]
        sides = rows[0].new_tensor([[size.height, size.width]]).expand(len(rows), -1)
        return Condition(padded("encoder_hidden_states", rows) | {"target_size": sides})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        def of_one_length(x: Tensor, told: Tensor, own: Condition) -> Tensor:
            sides = own["target_size"]
            output: Tensor = net(
                hidden_states=x,
                encoder_hidden_states=own["encoder_hidden_states"],
                timestep=told,
                original_size=sides,
                target_size=sides,
                crop_coords=torch.zeros_like(sides),
                return_dict=False,
            )[0]
            return output

        return length_by_length(net, ["encoder_hidden_states"], of_one_length, x_t, time, cond)
