"""What a suite's networks say of images, one row an image, from which every score is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.metrics.clip_score import cosines
from stepdistill.row_table import Rows
from stepdistill.suite import Suite


class Extraction:
    """A suite's networks, loaded.

    Attributes:
        suite: the protocol.
        network: of its Frechet distance.
    """

    def __init__(self, suite: Suite, device: torch.device | str = "cpu") -> None:
        self.suite = suite
        self.network = suite.network(device)

    def __call__(self, pixels: Tensor, prompts: Sequence[str] | None) -> Rows:
        """The rows of images: ``features`` [B, D], and ``clip_score`` [B] where the suite has it.

        Args:
            pixels: uint8 [B, 3, H, W].
            prompts: one an image; None for a suite without CLIP score.

        Raises:
            UserError: other pixels, or a number of prompts that is not that of the images.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            nan = " with NaN" if pixels.is_floating_point() and pixels.isnan().any() else ""
            found = f"{pixels.dtype} {list(pixels.shape)}{nan}"
            raise UserError(f"images are {found}; give batches uint8 [B, 3, H, W] in 0..255")
        rows = {"features": self.network.images(pixels)}
        if self.suite.clip_score:
            if len(prompts or []) != len(pixels):
                raise UserError(
                    f"{len(prompts or [])} prompts for {len(pixels)} images; the CLIP score needs one prompt an image"
                )
            rows["clip_score"] = cosines(rows["features"], self.network.texts(prompts or []))
        return rows
