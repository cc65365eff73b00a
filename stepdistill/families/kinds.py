"""Five kinds of families: around a UNet, around a transformer, the latter with prompts and masks alone, of videos,
conditioned on class numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from stepdistill.errors import UserError
from stepdistill.families.base import Family, call_default
from stepdistill.families.condition import Condition
from stepdistill.families.size import Size

# What of a UNet's blocks stays at the levels of GDD (Zheng and Yang 2024, 2405.20750); norms, what the time and the
# prompt act through, and the first and last layers are trained at each of them.
CONVOLUTIONS = r"resnets\.\d+\.conv[12]\.|(down|up)samplers\.|\.proj_(in|out)\."
OF_ITSELF = (
    r"(attn1|attentions\.\d+)"  # attention of the picture to itself, with and without a prompt beside it
)
UNET_1 = rf"{CONVOLUTIONS}|{OF_ITSELF}\.to_out\."
UNET_2 = rf"{UNET_1}|{OF_ITSELF}\.to_[qkv]\."
# All but keys and values of attention to prompts, which Custom Diffusion trains alone (Kumari et al. 2022, 2212.04488).
BUT_PROMPTS = r"^(?!.*\.attn2\.to_[kv]\.)"
UNET_LEVELS = {
    "level-1": UNET_1,
    "level-2": UNET_2,
    "level-3": rf"{UNET_2}|conv_shortcut\.",
    "all-but-prompts": BUT_PROMPTS,
}
# Of a transformer: feed-forward layers and what attention ends with.
BLOCK_1 = (
    r"\.(ff|ff_context|ff_[it]|ffn|feed_forward|img_mlp|txt_mlp|conv_ff)\.|\.to_(add_)?out(_t)?\."
    r"|single_transformer_blocks\.\d+\.proj_(mlp|out)\."
)
BLOCK_2 = rf"{BLOCK_1}|\.(to_[qkv](_t)?|add_[qkv]_proj)\."


DEPTHS = 2
"""Of a network, beside its middle, which a discriminator at several depths reads."""


class UNetFamily(Family):
    """Families around a diffusers UNet. The LoRA layers are those of LCM-LoRA (Luo et al. 2023, 2311.05556)."""

    network = "unet"
    lora_targets = tuple(
        "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
        "downsamplers.0.conv upsamplers.0.conv time_emb_proj".split()
    )
    freezable: ClassVar[Mapping[str, str]] = UNET_LEVELS
    passes = frozenset({"generator"})

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        side = self.pixels(pipe)
        return int(pipe.unet.config.in_channels), size.height // side, size.width // side

    def features_of(self, net: nn.Module) -> nn.Module:
        return net.get_submodule("mid_block")

    def feature_shape(self, net: Any, state: tuple[int, ...]) -> tuple[int, int, int]:
        halvings = sum(block.downsamplers is not None for block in net.down_blocks)
        height, width = (-(-side // 2**halvings) for side in state[-2:])
        return int(net.config.block_out_channels[-1]), height, width

    def feature_layers(self, net: Any) -> list[nn.Module]:
        # The last layer of the two smallest blocks on the way down, before they halve, and the middle.
        down = [
            (getattr(block, "attentions", None) or block.resnets)[-1] for block in net.down_blocks[-DEPTHS:]
        ]
        return [*down, self.features_of(net)]

    def layer_shapes(self, net: Any, state: tuple[int, ...]) -> list[tuple[int, int, int]]:
        found = list[tuple[int, int, int]]()
        height, width = state[-2:]
        for channels, block in zip(net.config.block_out_channels, net.down_blocks, strict=True):
            found.append((int(channels), height, width))
            if block.downsamplers is not None:
                height, width = -(-height // 2), -(-width // 2)
        return [*found[-DEPTHS:], self.feature_shape(net, state)]


class TransformerFamily(Family):
    """Families around a diffusers transformer.

    Class attributes:
        blocks: the network's attribute that holds its blocks, the middle one of which is read by discriminators.
    """

    blocks: ClassVar[str] = "transformer_blocks"
    lora_targets = tuple(
        "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out ff.net.0.proj ff.net.2 "
        "ff_context.net.0.proj ff_context.net.2".split()
    )
    freezable: ClassVar[Mapping[str, str]] = {"level-1": BLOCK_1, "level-2": BLOCK_2}

    def patch(self, net: Any) -> int:
        """Values of a state along a side of a token."""
        return int(net.config.patch_size)

    def unit(self, pipe: Any) -> int:
        return self.pixels(pipe) * self.patch(pipe.transformer)

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        side = self.pixels(pipe)
        return int(pipe.transformer.config.in_channels), size.height // side, size.width // side

    def tokens(self, net: Any, state: tuple[int, ...]) -> int:
        return (state[-2] // self.patch(net)) * (state[-1] // self.patch(net))

    def features_of(self, net: nn.Module) -> nn.Module:
        count = len(list(net.get_submodule(self.blocks).children()))
        return net.get_submodule(f"{self.blocks}.{count // 2}")

    def feature_layers(self, net: nn.Module) -> list[nn.Module]:
        count = len(list(net.get_submodule(self.blocks).children()))
        places = sorted({count // 4, count // 2, 3 * count // 4})
        return [net.get_submodule(f"{self.blocks}.{place}") for place in places]

    def feature_shape(self, net: Any, state: tuple[int, ...]) -> tuple[int, int, int]:
        frames = state[-3] if self.video else 1
        height, width = (side // self.patch(net) for side in state[-2:])
        return int(net.config.num_attention_heads * net.config.attention_head_dim), frames * height, width


class MaskedTextFamily(TransformerFamily):
    """Transformers that are told the tokens of a prompt and their mask.

    Class attributes:
        encoding: arguments of the pipeline's call that it hands on to ``encode_prompt``, at their defaults.
    """

    encoding: ClassVar[tuple[str, ...]]

    def _conditions(self, pipe: Any, prompts: list[str], guided: bool) -> tuple[Condition, Condition]:
        own = {name: call_default(pipe, name) for name in self.encoding}
        embeds, mask, *null = pipe.encode_prompt(prompts, guided, device=pipe.device, **own)
        return tuple(  # type: ignore[return-value]
            Condition({"encoder_hidden_states": tokens, "encoder_attention_mask": where})
            for tokens, where in ((embeds, mask), null)
        )

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        return self._conditions(pipe, prompts, False)[0]

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self._conditions(pipe, [""], True)[1]


class VideoFamily(TransformerFamily):
    """Families of videos: a state is [C, F, H, W]."""

    video = True

    @abstractmethod
    def stride(self, pipe: Any) -> int:
        """Frames that one frame of a state stands for; the first stands for one."""

    def default_size(self, pipe: Any) -> Size:
        return Size(*(call_default(pipe, name) for name in ("height", "width", "num_frames")))

    def check_size(self, pipe: Any, size: Size) -> None:
        super().check_size(pipe, size)
        if (size.frames - 1) % (unit := self.stride(pipe)):
            raise UserError(
                f"data.size asks for {size.frames} frames, but this pipeline draws {unit} n + 1 of them"
            )

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        channels, height, width = super().state_shape(pipe, size)
        return channels, (size.frames - 1) // self.stride(pipe) + 1, height, width

    def tokens(self, net: Any, state: tuple[int, ...]) -> int:
        return state[-3] * super().tokens(net, state)


class LabelFamily(Family):
    """Pipelines conditioned on a class number, given as text: ``"207"``."""

    has_prompts = False
    any_size = False

    @abstractmethod
    def classes(self, pipe: Any) -> int:
        """How many classes there are; 0 for an unconditional model."""

    def label_of(self, pipe: Any, prompt: str) -> int:
        """The class number that a prompt means."""
        count = self.classes(pipe)
        if not prompt.strip().isdecimal() or int(prompt) >= count:
            raise UserError(
                f"'{prompt}' is not a class of this {type(pipe).__name__}: give a number from 0 to {count - 1}"
            )
        return int(prompt)

    def call_prompts(self, pipe: Any, prompts: list[str]) -> list[str]:
        return [str(self.label_of(pipe, prompt)) for prompt in prompts] if self.classes(pipe) else prompts

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        if not self.classes(pipe):
            return Condition()
        labels = [self.label_of(pipe, prompt) for prompt in prompts]
        return Condition({"class_labels": torch.tensor(labels, device=pipe.device)})
