"""Guidance as functions of predictions. Scale 1 is no guidance; g = 1 + w where a paper writes w."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepdistill.diffusion.path import Output, Prediction, per_sample


def extrapolate(weak: Prediction, strong: Prediction, scale: float | Tensor) -> Prediction:
    """weak + scale (strong - weak), on x0 and eps alike.

    With ``weak`` unconditional this is classifier-free guidance (Ho and Salimans 2022, 2207.12598, eq. 6); with
    ``weak`` a smaller or less trained network it is autoguidance (Karras et al. 2024, 2406.02507, eq. 3).

    Args:
        weak, strong: predictions at the same x_t and t, tensors [B, ...].
        scale: one number, or one per sample [B]; 1 returns ``strong``.
    """
    g = per_sample(scale, strong.x0) if isinstance(scale, Tensor) else scale
    return Prediction(
        strong.path,
        weak.x0 + g * (strong.x0 - weak.x0),
        weak.eps + g * (strong.eps - weak.eps),
        strong.t,
    )


def rescaled(guided: Prediction, plain: Prediction, share: float, kind: Output, x_t: Tensor) -> Prediction:
    """``guided`` with its output's deviation drawn towards that of ``plain``, sample by sample: out' = share out
    std(plain) / std(out) + (1 - share) out (Lin et al. 2023, 2305.08891, eq. 15 and 16). Guidance spreads the output,
    which a zero-terminal-SNR teacher shows as over-exposure.

    Args:
        guided, plain: predictions at the same x_t and t, tensors [B, ...].
        share: phi of the paper, in [0, 1].
        kind: of the network's output, whose deviation it is, as in diffusers' ``rescale_noise_cfg``.
        x_t: where they were made.
    """
    out, wanted = (said.path.target(said.x0, said.eps, said.t, kind) for said in (guided, plain))
    ratio = wanted.flatten(1).std(1) / out.flatten(1).std(1)  # [B]
    return guided.path.read(per_sample(1 + share * (ratio - 1), out) * out, kind, x_t, guided.t)


def with_length_of(
    guided: Prediction,
    plain: Prediction,
    kind: Output,
    x_t: Tensor,
    pack: Callable[[Tensor], Tensor],
    unpack: Callable[[Tensor], Tensor],
) -> Prediction:
    """``guided`` with its output's length, along the last axis of what ``pack`` makes of it, that of ``plain``: as
    diffusers' Qwen-Image and Lumina 2 guide.

    Args:
        guided, plain: predictions at the same x_t and t, tensors [B, ...].
        kind: of the network's output, whose length it is.
        x_t: where they were made.
        pack, unpack: outputs [B, ...] to what has lengths, and back.
    """
    out, wanted = (pack(said.path.target(said.x0, said.eps, said.t, kind)) for said in (guided, plain))
    ratio = wanted.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True)
    return guided.path.read(unpack(out * ratio), kind, x_t, guided.t)


def in_interval(scale: float | Tensor, t: Tensor, low: float, high: float) -> Tensor:
    """``scale``, one or [B], where low <= t <= high, else 1 (Kynkaanniemi et al. 2024, 2404.07724); t and the result
    are [B]."""
    inside = (t >= low) & (t <= high)
    return torch.where(inside, torch.as_tensor(scale, dtype=t.dtype, device=t.device), torch.ones_like(t))
