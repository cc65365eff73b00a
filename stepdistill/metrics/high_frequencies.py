"""The metric ``high_frequencies`` of a suite, in the form of a user's own."""

from __future__ import annotations

import torch

from stepdistill.metrics.own import DrawnImages, RealImages
from stepdistill.metrics.spectrum import high_frequency_share
from stepdistill.metrics.standard_errors import of_mean


class HighFrequencies:
    """The mean share of high frequencies. Neither more nor less is better: compare it with that of the teacher."""

    name = "high_frequencies"
    better = "neither"
    needs = ("images",)

    def compute(self, drawn: DrawnImages, reference: RealImages) -> tuple[float, float]:
        """The share, in [0, 1], and its standard error."""
        assert drawn.images is not None
        found = of_mean(torch.cat([high_frequency_share(images) for images in drawn.images]).double())
        return found.value, found.standard_error
