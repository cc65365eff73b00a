"""The metric ``colour_hits`` of a suite, in the form of a user's own."""

from __future__ import annotations

import torch

from stepdistill.metrics.colours import hue_share, hues_of
from stepdistill.metrics.own import DrawnImages, RealImages
from stepdistill.metrics.standard_errors import of_mean

ENOUGH = 0.5
"""Share of the ink in the named hue that makes an image a hit: our choice."""


class ColourHits:
    """The share of images that have the colour their prompt names, by rule, without a network. Prompts that name no
    colour of a thing of one colour do not count."""

    name = "colour_hits"
    better = "higher"
    needs = ("images", "prompts")

    def compute(self, drawn: DrawnImages, reference: RealImages) -> tuple[float, float]:
        """The share, in [0, 1], and its standard error.

        Raises:
            ValueError: no prompt names a colour.
        """
        assert drawn.images is not None and drawn.prompts is not None
        hues = hues_of(drawn.prompts)
        if bool(hues.isnan().all()):
            raise ValueError("no prompt names the colour of a thing of one colour, such as 'red heart'")
        images = torch.cat([images.float() / 255 for images in drawn.images])
        named = ~hues.to(images.device).isnan()
        found = of_mean((hue_share(images, hues.to(images.device))[named] >= ENOUGH).double())
        return found.value, found.standard_error
