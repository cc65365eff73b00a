"""How much of pictures is fine detail: what climbs a network often hides in high frequencies, where it sees more than
people do."""

from __future__ import annotations

import torch
from torch import Tensor


def high_frequency_share(images: Tensor) -> Tensor:
    """The sum of |FFT|^2 above half the Nyquist frequency over that of all frequencies but the mean, [B] in [0, 1].

    Args:
        images: [B, C, H, W], of any scale; more dimensions before H and W count as channels.
    """
    power = torch.fft.rfft2(images.float(), norm="ortho").abs().square().flatten(1, -3).sum(1)
    height, width = images.shape[-2:]
    down = torch.fft.fftfreq(height, device=images.device)[:, None]
    across = torch.fft.rfftfreq(width, device=images.device)[None]
    twice = torch.full_like(across, 2.0)  # a real picture's other half
    twice[:, 0] = 1.0
    if width % 2 == 0:
        twice[:, -1] = 1.0
    power = power * twice
    power[:, 0, 0] = 0.0
    high = torch.maximum(down.abs(), across) > 0.25  # cycles a pixel; 0.5 is Nyquist's
    share: Tensor = (power * high).sum(dim=(1, 2)) / power.sum(dim=(1, 2)).clamp_min(1e-12)
    return share
