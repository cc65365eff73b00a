"""The share of high frequencies, in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from stepdistill.metrics.spectrum import high_frequency_share


def wave(cycles: int, size: int = 32) -> torch.Tensor:
    """A wave of so many cycles across, [1, 3, size, size], about a mean of its own."""
    line = torch.cos(2 * math.pi * cycles * torch.arange(size) / size)
    return (0.4 + 0.3 * line).expand(1, 3, size, size)


@pytest.mark.parametrize(("cycles", "share"), [(1, 0.0), (8, 0.0), (9, 1.0), (16, 1.0)])
def test_a_wave_counts_above_half_of_nyquists_frequency(cycles: int, share: float) -> None:
    """Of 32 pixels Nyquist has 16 cycles. Down or across, and whatever the scale and the mean."""
    image = wave(cycles)
    for seen in (image, image.mT, 255 * image - 9):
        assert float(high_frequency_share(seen)) == pytest.approx(share, abs=1e-5)


def test_two_waves_share_by_their_squares() -> None:
    both = wave(2) + 0.5 * wave(12)
    assert float(high_frequency_share(both)) == pytest.approx(0.25 / 1.25, rel=1e-4)


def test_of_white_noise_it_is_the_share_of_the_plane() -> None:
    """All frequencies alike: all but the square of those up to half, 17 of 32 each way, and not the mean."""
    noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = (32**2 - 17**2) / (32**2 - 1)
    assert float(high_frequency_share(noise).mean()) == pytest.approx(wanted, rel=5e-3)


def test_frames_of_a_video_count_as_channels() -> None:
    video = torch.stack([wave(2), 0.5 * wave(12)], 2)  # [1, 3, 2, H, W]
    assert float(high_frequency_share(video)) == pytest.approx(0.25 / 1.25, rel=1e-4)
