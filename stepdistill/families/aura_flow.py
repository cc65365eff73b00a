"""AuraFlow: AuraFlowTransformer2DModel with a flow-matching path."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.size import Size


class AuraFlow(TransformerFamily):
    name = "AuraFlow"
    pipelines = ("AuraFlowPipeline",)
    clock = "t"
    blocks = "single_transformer_blocks"
    lora_targets = (
        *TransformerFamily.lora_targets,
        *(
            f"{part}.{layer}"
            for part in ("ff", "ff_context")
            for layer in ("linear_1", "linear_2", "out_projection")
        ),
    )

    def default_size(self, pipe: Any) -> Size:
        return Size(call_default(pipe, "height"), call_default(pipe, "width"))

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        # Of full length; what is padding is zero, and the network is not told where it begins.
        length = call_default(pipe, "max_sequence_length")
        embeds, *_ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=pipe.device, max_sequence_length=length
        )
        return Condition({"encoder_hidden_states": embeds})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        embeds = cond["encoder_hidden_states"]
        output: Tensor = net(x_t, encoder_hidden_states=embeds, timestep=time, return_dict=False)[0]
        return output

    def picture(self, net: Any, output: Any, state: tuple[int, ...]) -> Tensor:
        tokens: Tensor = output[:, -self.tokens(net, state) :]  # behind the prompt's
        return tokens
