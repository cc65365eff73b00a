"""What the evaluation needs of a feature network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

Precision = Literal["float32", "bf16"]
"""Of weights and activations of the network that looks at images; what it gives is float32 in any case, and so are
texts. bf16 moves features by parts in a hundred and is a protocol of its own: docs/measure/own_suite.md."""
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}


def titled(name: str, precision: Precision) -> str:
    """The name of a score in features of a precision."""
    return name if precision == "float32" else f"{name}, {precision}"


class FeatureNetwork(Protocol):
    """What the evaluation needs of a network.

    Attributes:
        name: its specification, as a suite writes it.
        sha256: of its weights.
        device: where it runs, and where its features lie.
        precision: see :data:`Precision`.
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
    def device(self) -> torch.device: ...
    @property
    def precision(self) -> Precision: ...
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
        """Features [B, D] float32 of images uint8 [B, 3, H, W]; from pinned memory nothing waits for their copy."""
        ...

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Features [B, D] float32 of prompts; only where ``clip_name`` is not None."""
        ...
