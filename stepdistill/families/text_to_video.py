"""ModelScope's text to video and Zeroscope: UNet3DConditionModel on latents of a VAE of pictures.

Wang et al. 2023, "ModelScope Text-to-Video Technical Report", 2308.06571.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from stepdistill.families.base import call_default
from stepdistill.families.size import Size
from stepdistill.families.stable_diffusion import StableDiffusion


class TextToVideo(StableDiffusion):
    """A state is [C, F, H, W]; the network, the scheduler and the VAE have frames in their batch.

    So a pipeline that takes fresh noise between its steps takes no generator for each prompt: they are drawn alone.
    """

    name = "ModelScope text to video"
    pipelines: ClassVar[tuple[str, ...]] = ("TextToVideoSDPipeline",)
    video = True
    alone = True
    # Without those of ResNets: they have the names of whole sequences of temporal layers.
    lora_targets = tuple(
        "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv_shortcut "
        "downsamplers.0.conv upsamplers.0.conv time_emb_proj".split()
    )

    def default_size(self, pipe: Any) -> Size:
        size = super().default_size(pipe)
        return Size(size.height, size.width, int(call_default(pipe, "num_frames")))

    def stride(self, pipe: Any) -> int:
        """Frames that one frame of a state stands for."""
        return 1

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        channels, height, width = super().state_shape(pipe, size)
        return channels, size.frames, height, width

    def pack(self, x_t: Tensor) -> Tensor:
        return x_t.transpose(1, 2).flatten(0, 1)

    def unpack(self, packed: Tensor, state: tuple[int, ...]) -> Tensor:
        frames: Tensor = packed.unflatten(0, (-1, state[1]))
        return frames.transpose(1, 2)

    def feature_shape(self, net: Any, state: tuple[int, ...]) -> tuple[int, int, int]:
        channels, height, width = super().feature_shape(net, state)
        return channels, state[1] * height, width

    def layer_shapes(self, net: Any, state: tuple[int, ...]) -> list[tuple[int, int, int]]:
        *down, middle = super().layer_shapes(net, state)
        return [*((channels, state[1] * height, width) for channels, height, width in down), middle]

    def picture(self, net: nn.Module, output: Any, state: tuple[int, ...]) -> Tensor:
        found = super().picture(net, output, state)
        return self.unpack(found, state).flatten(2, 3)

    def encoded(self, vae: Any, images: Tensor) -> Tensor:
        return self.unpack(super().encoded(vae, self.pack(images)), tuple(images.shape[1:]))

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        return self.unpack(super().decoded(vae, self.pack(latents)), tuple(latents.shape[1:]))
