"""HiDream-I1: HiDreamImageTransformer2DModel, a mixture of experts on latents; what it returns is x0 - eps."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from stepdistill.diffusion.shift import shift_of
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.size import Size


class HiDream(TransformerFamily):
    name = "HiDream-I1"
    pipelines = ("HiDreamImagePipeline",)
    passes = frozenset({"mu"})
    blocks = "double_stream_blocks"
    picture_tokens = 0
    lora_targets = (
        *(f"{name}{stream}" for name in ("to_q", "to_k", "to_v", "to_out") for stream in ("", "_t")),
        *(f"{part}.w{i}" for part in ("shared_experts", "ff_t") for i in (1, 2, 3)),
    )

    def default_size(self, pipe: Any) -> Size:
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return Size(side, side)

    def check_size(self, pipe: Any, size: Size) -> None:
        super().check_size(pipe, size)
        own, unit = self.default_size(pipe), 2 * self.pixels(pipe)
        scale = math.sqrt(own.height * own.width / (size.height * size.width))
        drawn = Size(*(int(side * scale // unit * unit) for side in (size.height, size.width)))
        if drawn != size:
            raise UserError(
                f"data.size is {size}, but {type(pipe).__name__} draws all pictures of one area, and {drawn} for it: "
                f"set [{drawn.height}, {drawn.width}]"
            )

    def shift(self, pipe: Any, tokens: int) -> float:
        return shift_of(pipe.scheduler, pipe.transformer.max_seq)  # of one size, whatever is drawn

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        t5, _, llama, _, pooled, _ = pipe.encode_prompt(
            prompts, device=pipe.device, do_classifier_free_guidance=False
        )  # the states of every layer of Llama, [layers, B, L, D]
        tokens = {"encoder_hidden_states_t5": t5, "encoder_hidden_states_llama3": llama.transpose(0, 1)}
        return Condition({**tokens, "pooled_embeds": pooled})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        _with_gradients(net)
        output: Tensor = net(
            hidden_states=x_t,
            timesteps=time,
            encoder_hidden_states_t5=cond["encoder_hidden_states_t5"],
            encoder_hidden_states_llama3=cond["encoder_hidden_states_llama3"].transpose(0, 1),
            pooled_embeds=cond["pooled_embeds"],
            return_dict=False,
        )[0]
        return -output

    def picture(self, net: nn.Module, output: Any, state: tuple[int, ...]) -> Tensor:
        # Of pictures that are not square, tokens are padded to the most there are.
        return super().picture(net, output, state)[:, : self.tokens(net, state)]


def _with_gradients(net: nn.Module) -> None:
    """Lets experts have gradients: in evaluation mode, diffusers runs them without.

    The whole network in training mode would return its tokens in another order.
    """
    from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

    for module in net.modules():
        if isinstance(module, MOEFeedForwardSwiGLU):
            module.training, module._force_inference_output = True, False
