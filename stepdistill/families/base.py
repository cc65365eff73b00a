"""What differs between model families: the denoiser's attribute, its forward call, its time, its conditioning.

Everything else comes from the pipeline itself: ``encode_prompt``, ``vae``, ``scheduler.config``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.diffusion.path import Path, TablePath, within
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


UNET_LORA = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
    "downsamplers.0.conv upsamplers.0.conv time_emb_proj"
).split()
"""Layers of a diffusers UNet that carry LoRA in LCM-LoRA (Luo et al. 2023, 2311.05556)."""

TRANSFORMER_LORA = (
    "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out ff.net.0.proj ff.net.2 "
    "ff_context.net.0.proj ff_context.net.2"
).split()


GAP = "gap"
"""The condition that holds t - s [B], in [0, 1], for a network with a second time."""

GAP_SCALE = 100.0
"""A gap times this goes through the sinusoids, a tenth of the scale of diffusers' timesteps: gaps of 1 / 100 are told
apart, and derivatives in s stay a tenth as steep."""


class Family(ABC):
    """One family of diffusers pipelines.

    Class attributes:
        name: the family's name in messages.
        pipelines: names of the pipeline classes it serves.
        denoiser: the pipeline's attribute that holds the network.
        has_prompts: whether conditions come from text prompts.
        lora_targets: suffixes of the layers that carry LoRA.
        passes_generator: whether the pipeline hands its generator to the scheduler's step, as re-noising between steps
            needs for a seed to give one picture.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    denoiser: ClassVar[str] = "unet"
    has_prompts: ClassVar[bool] = True
    lora_targets: ClassVar[list[str]] = UNET_LORA
    passes_generator: ClassVar[bool] = True

    def adopt(self, pipe: DiffusionPipeline) -> None:
        """Readies a pipeline that becomes a teacher; what it draws stays the same."""
        return None

    @abstractmethod
    def call(self, net: nn.Module, x_t: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """The network's raw output [B, C, H, W] at x_t [B, C, H, W] and its own timestep [B]."""

    @abstractmethod
    def encode(self, pipe: DiffusionPipeline, prompts: list[str]) -> Condition:
        """The conditions of the prompts, through the pipeline's own encoder, on the pipeline's device."""

    @abstractmethod
    def null(self, pipe: DiffusionPipeline) -> Condition | None:
        """The condition (B = 1) that classifier-free guidance starts from; None where the model has none."""

    @abstractmethod
    def features_of(self, net: nn.Module) -> nn.Module:
        """The module whose output is the network's inner picture of x_t, read by a discriminator head."""

    @abstractmethod
    def feature_shape(self, net: nn.Module) -> tuple[int, int, int]:
        """(D, h, w) of those features at the network's default size: their channels, and the map they form, also as
        the tokens of a transformer."""

    def student_pipeline(self, pipe: Any) -> str | None:
        """Class (of a denoiser and a scheduler) a student's pipeline is saved as; None keeps the teacher's."""
        return None

    def call_prompts(self, pipe: Any, prompts: list[str]) -> list[str]:
        """The prompts as :meth:`call_arguments` takes them: class names that the pipeline knows as their numbers."""
        return prompts

    def call_arguments(self, pipeline: str, prompts: list[str], guidance: float) -> dict[str, Any]:
        """Arguments with which a student's pipeline (of the class ``pipeline``) draws these prompts; ``guidance`` 0 is
        the one scale that switches guidance off in every pipeline."""
        return {"prompt": prompts, "guidance_scale": guidance}

    def timestep(self, path: Path, t: Tensor) -> Tensor:
        """The network's own time for t [B]: the (fractional) index of a discrete table, 1000 t on a flow path."""
        if isinstance(path, TablePath):
            position = t.double() * path.steps - 1
            nearest = position.round()
            # 0.75 in float32 times 1000 must be timestep 749, the very number diffusers' scheduler passes.
            # It is added as a constant: the derivative in t is that of position, not the zero of a rounded number.
            near = (position - nearest).abs() < 1e-3
            position = torch.where(near, position + (nearest - position).detach(), position)
            return within(position, 0, path.steps - 1).float()
        return t.float() * 1000

    def latent_shape(self, pipe: Any) -> tuple[int, int, int]:
        """(C, H, W) of what the denoiser works on, at the pipeline's default size."""
        net = getattr(pipe, self.denoiser)
        return (int(net.config.in_channels), *self.size_of(net))

    @staticmethod
    def size_of(net: Any) -> tuple[int, int]:
        """(H, W) of what the network works on, at its default size."""
        size = net.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    def image_tokens(self, pipe: Any) -> int:
        """Tokens of an image at the pipeline's default size, by which a dynamic time shift goes."""
        _, height, width = self.latent_shape(pipe)
        side = getattr(pipe, self.denoiser).config.get("patch_size") or 1
        return (height // side) * (width // side)

    def to_latents(self, pipe: Any, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to the denoiser's scale: the mode of the VAE's posterior, shifted, scaled."""
        with torch.autocast(images.device.type, enabled=False):
            latents: Tensor = pipe.vae.encode(images.to(pipe.vae.dtype)).latent_dist.mode().float()
        shift, scale = self._affine(pipe.vae.config, latents)
        return (latents - shift) * scale

    def to_images(self, pipe: Any, latents: Tensor) -> Tensor:
        """The inverse: latents to images [B, 3, H, W] in [0, 1]."""
        shift, scale = self._affine(pipe.vae.config, latents)
        with torch.autocast(latents.device.type, enabled=False):
            own = (latents / scale + shift).to(pipe.vae.dtype)
            images: Tensor = pipe.vae.decode(own, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @staticmethod
    def _affine(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale from a VAE's latents to the denoiser's: by channel where the config states both moments."""
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        scale = like.new_tensor(config.scaling_factor)
        if mean is None or deviation is None:
            return like.new_tensor(config.get("shift_factor") or 0.0), scale
        return like.new_tensor(mean).view(1, -1, 1, 1), scale / like.new_tensor(deviation).view(1, -1, 1, 1)

    def slimmer(self, net: nn.Module, width: float, depth: float) -> nn.Module:
        """A smaller network of the same class with random weights: channels and layers over the old ones in (0, 1].

        Raises:
            UserError: where the family has no smaller network.
        """
        raise UserError(
            f"options.width and options.depth need a UNet2DModel or UNet2DConditionModel, which {self.name} has not: "
            "leave both at 1"
        )

    def guidance_input(self, net: nn.Module) -> nn.Module:
        """A copy of the network that also takes the embedded guidance scale, changing nothing at the start."""
        raise UserError(
            f"options.guidance_range needs a network that takes a guidance embedding; {self.name} has none. "
            "Use one fixed options.guidance."
        )

    def takes_guidance(self, net: nn.Module) -> bool:
        """Whether the network has guidance embedded: it takes the scale as an input, and one call is guided."""
        return False

    def fold_guidance(self, net: nn.Module, guidance: float) -> nn.Module:
        """The network without that input that equals ``net`` wherever the scale is ``guidance``."""
        raise NotImplementedError(f"{self.name} takes no guidance embedding")

    def embed_guidance(self, net: nn.Module, guidance: Tensor) -> Tensor:
        """The embedding [B, D] of guidance scales [B], as the pipeline would make it."""
        raise NotImplementedError(f"{self.name} takes no guidance embedding")

    def second_time(self, net: nn.Module) -> nn.Module:
        """A copy of the network that is also told t - s, the length of its jump, changing nothing at the start.

        Raises:
            UserError: where the network has no slot for it.
        """
        raise UserError(
            f"this method needs a network with a second time, which {self.name} has no slot for. There is one in "
            "unconditional UNet2DModel and in UNet2DConditionModel; or take a method with one time, such as dmd"
        )

    def has_second_time(self, net: nn.Module) -> bool:
        """Whether the network is one that :meth:`second_time` made."""
        return False

    def without_variance(self, net: nn.Module) -> nn.Module:
        """The network without the outputs that :meth:`call` cuts off and the student's pipeline does not."""
        return net

    @staticmethod
    def gap_of(x_t: Tensor, cond: Condition) -> Tensor:
        """t - s [B] out of a condition; 0, the instantaneous velocity, where nothing says how long the jump is."""
        return cond.tensors[GAP] if GAP in cond.tensors else x_t.new_zeros(len(x_t))

    def fold_second_time(self, net: nn.Module, gap: float) -> nn.Module:
        """The stock network that equals ``net`` wherever t - s is ``gap``: the constant embedding goes into a bias."""
        raise NotImplementedError(f"{self.name} has no second time")


class LabelFamily(Family):
    """Pipelines conditioned on a class number, given as text: ``"207"``."""

    has_prompts = False

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

    def encode(self, pipe: Any, prompts: list[str]) -> Condition:
        if not self.classes(pipe):
            return Condition()
        labels = [self.label_of(pipe, prompt) for prompt in prompts]
        return Condition({"class_labels": torch.tensor(labels, device=pipe.device)})
