"""What the evaluation needs of a feature network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class FeatureNetwork(Protocol):
    """What the evaluation needs of a network.

    Attributes:
        name: its specification, as a suite writes it.
        sha256: of its weights.
        dimension: D.
        resize: how images reach the network's resolution, in words.
        fd_name: the name of the Frechet distance in these features.
        fd_scale: what that distance is multiplied by.
        clip_name: the name of the image-text cosine, None where there are no texts.
        kernel_scale: gamma of the kernel distance.
    """

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def resize(self) -> str: ...
    @property
    def fd_name(self) -> str: ...
    @property
    def fd_scale(self) -> float: ...
    @property
    def clip_name(self) -> str | None: ...
    @property
    def kernel_scale(self) -> float: ...

    def images(self, pixels: Tensor) -> Tensor:
        """Features [B, D] float32 on the CPU of images uint8 [B, 3, H, W]."""
        ...

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Features [B, D] float32 on the CPU of prompts; only where ``clip_name`` is not None."""
        ...
