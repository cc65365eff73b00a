"""Guidance on what networks return. Scale 1 is no guidance; g = 1 + w where a paper writes w."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.diffusion.path import per_sample


def extrapolate(weak: Tensor, strong: Tensor, scale: float | Tensor) -> Tensor:
    """weak + scale (strong - weak), of any output kind: x0 and eps are affine in the output, so that guiding it guides
    both.

    With ``weak`` unconditional this is classifier-free guidance (Ho and Salimans 2022, 2207.12598, eq. 6); with
    ``weak`` a smaller or less trained network it is autoguidance (Karras et al. 2024, 2406.02507, eq. 3).

    Args:
        weak, strong: outputs at the same x_t and t, [B, ...].
        scale: one number, or one per sample [B]; 1 returns ``strong``.
    """
    return weak + (per_sample(scale, strong) if isinstance(scale, Tensor) else scale) * (strong - weak)


def rescaled(guided: Tensor, plain: Tensor, share: float) -> Tensor:
    """``guided`` with its deviation drawn towards that of ``plain``, sample by sample: out' = share out std(plain) /
    std(out) + (1 - share) out (Lin et al. 2023, 2305.08891, eq. 15 and 16; diffusers' ``rescale_noise_cfg``). Guidance
    spreads the output, which a zero-terminal-SNR teacher shows as over-exposure.

    Args:
        guided, plain: outputs at the same x_t and t, [B, ...].
        share: phi of the paper, in [0, 1].
    """
    ratio = plain.flatten(1).std(1) / guided.flatten(1).std(1)  # [B]
    return per_sample(1 + share * (ratio - 1), guided) * guided


def with_length_of(guided: Tensor, plain: Tensor) -> Tensor:
    """``guided`` with its length along the last axis that of ``plain``, as diffusers' Qwen-Image and Lumina 2 guide:
    outputs at the same x_t and t, in the form in which those pipelines have them."""
    wanted, found = (torch.linalg.vector_norm(out, dim=-1, keepdim=True) for out in (plain, guided))
    kept: Tensor = guided * (wanted / found)
    return kept


def in_interval(scale: float | Tensor, t: Tensor, low: float, high: float) -> Tensor:
    """``scale``, one or [B], where low <= t <= high, else 1 (Kynkaanniemi et al. 2024, 2404.07724); t and the result
    are [B]."""
    inside = (t >= low) & (t <= high)
    return torch.where(inside, scale if isinstance(scale, Tensor) else torch.full_like(t, scale), 1.0)
