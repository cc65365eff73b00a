"""Flux.2 [klein] and [dev]: Flux2Transformer2DModel on latents that are patches already, one token each; guidance is an
input of [dev]."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from stepdistill.families._from_picture import PICTURE, TokensBehind, pictures_named
from stepdistill.families.base import call_default
from stepdistill.families.condition import GUIDANCE, Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.families.size import Size
from stepdistill.pictures.given import any_named, words_of

LARGEST = 1024 * 1024
"""Pixels of a picture that is drawn from, which their pipelines shrink to so many."""
OF_PICTURE = 10
"""What stands in a token's ids where the state's have 0."""


class Flux2Klein(TokensBehind, TransformerFamily):
    name = "Flux.2 [klein]"
    picture_optional = True
    pipelines = ("Flux2KleinPipeline",)
    clock = "t"
    passes = frozenset({"sigmas", "mu"})
    lora_targets = (
        *(*TransformerFamily.lora_targets, "attn.to_qkv_mlp_proj"),
        *(f"{part}.linear_{end}" for part in ("ff", "ff_context") for end in ("in", "out")),
        # By number, as to_out of the blocks before is no layer but a list of them.
        *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(64)),
    )

    def default_size(self, pipe: Any) -> Size:
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return Size(side, side)

    def pixels(self, pipe: Any) -> int:
        return 2 * int(pipe.vae_scale_factor)

    def shift(self, pipe: Any, tokens: int) -> float:
        if not pipe.scheduler.config.get("use_dynamic_shifting"):
            return super().shift(pipe, tokens)
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        # A fit that goes by the number of steps as well: that of its call.
        return math.exp(compute_empirical_mu(tokens, call_default(pipe, "num_inference_steps")))

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        own = {name: call_default(pipe, name) for name in ("max_sequence_length", "text_encoder_out_layers")}
        embeds, _ = pipe.encode_prompt(words_of(prompts), pipe.device, **own)  # of full length
        found = Condition({"encoder_hidden_states": embeds})
        if not any_named(prompts):
            return found
        return found.with_tensor(PICTURE, self.latents_of(pipe, pictures_named(prompts, size), size))

    def latents_of(self, pipe: Any, pictures: list[Image], size: Size) -> Tensor:
        if size.height * size.width > LARGEST:
            pictures = [pipe.image_processor._resize_to_target_area(each, LARGEST) for each in pictures]
        sides = [side // self.unit(pipe) * self.unit(pipe) for side in pictures[0].size]
        crop = partial(pipe.image_processor.preprocess, width=sides[0], height=sides[1], resize_mode="crop")
        frames = [crop(each)[:, None].to(pipe.device, torch.float32) for each in pictures]
        return torch.cat([self.to_states(pipe, each) for each in frames])

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return None if pipe.config.is_distilled else self.encode(pipe, [""], size)

    def pack(self, x_t: Tensor) -> Tensor:
        return x_t.flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor, state: tuple[int, ...]) -> Tensor:
        states: Tensor = packed.transpose(1, 2).unflatten(2, state[1:])
        return states

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        embeds, (height, width) = cond["encoder_hidden_states"], x_t.shape[2:]
        tokens, ids = self.pack(x_t), _ids(height, width, 1, x_t.device)
        count = tokens.shape[1]
        if (picture := cond.get(PICTURE)) is not None:
            own = _ids(picture.shape[2], picture.shape[3], 1, x_t.device)
            ids = torch.cat([ids, own + own.new_tensor([OF_PICTURE, 0, 0, 0])])
            tokens = torch.cat([tokens, self.pack(picture).to(tokens)], 1)
        output: Tensor = net(
            hidden_states=tokens,
            timestep=time,
            encoder_hidden_states=embeds,
            txt_ids=_ids(1, 1, embeds.shape[1], x_t.device),
            img_ids=ids,
            guidance=cond.get(GUIDANCE),
            return_dict=False,
        )[0]
        return self.unpack(output[:, :count], tuple(x_t.shape[1:]))

    # States are patches of 2x2 latents, by the statistics of a batch normalisation.

    def normalised(self, vae: Any, latents: Tensor) -> Tensor:
        mean, deviation = _moments(vae)
        return (nn.functional.pixel_unshuffle(latents, 2) - mean) / deviation

    def denormalised(self, vae: Any, states: Tensor) -> Tensor:
        mean, deviation = _moments(vae)
        return nn.functional.pixel_shuffle(states * deviation + mean, 2)


class AtZero(NetworkChanges):
    """A student goes on taking a scale, but its embedding of 0, what its call is given, is that of the teacher's scale.

    The embedding has no bias that a constant could go into. Its sinusoids of 0 are a constant, though: all cosines are
    1 and all sines 0, and a first layer that looks along them alone says of 0 what the teacher's says of its scale.
    """

    def takes_guidance(self, net: Any) -> bool:
        if not net.config.guidance_embeds:
            return False
        weight = net.time_guidance_embed.guidance_embedder.linear_1.weight
        return weight.is_meta or bool(weight[:, weight.shape[1] // 2 :].any())

    @torch.no_grad()
    def fold_guidance(self, net: Any, guidance: float) -> nn.Module:
        plain = copy.deepcopy(net)
        embed = plain.time_guidance_embed
        layer = embed.guidance_embedder.linear_1
        scales = torch.tensor([1000 * guidance, 0.0], device=layer.weight.device)
        told, zero = embed.time_proj(scales).to(layer.weight.dtype)
        layer.weight.copy_(torch.outer(layer(told), zero) / zero.square().sum())
        return plain  # type: ignore[no-any-return]


class Flux2Dev(Flux2Klein):
    name = "Flux.2 [dev]"
    pipelines = ("Flux2Pipeline",)
    changes = AtZero()

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return None

    def call(self, net: Any, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        if cond.get(GUIDANCE) is None:
            cond = cond.with_tensor(GUIDANCE, torch.zeros_like(time))
        return super().call(net, x_t, time, cond)


def _ids(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """[height width length, 4]: 0, row and column of a token of the picture, number of one of the prompt."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, height, width, length)))


def _moments(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of patches, each [1, C, 1, 1]."""
    mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
    return mean, torch.sqrt(variance + vae.config.batch_norm_eps)
