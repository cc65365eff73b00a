"""Weights of a field by a reward: good samples, and what in them the reward looks at, count more.

Stream-R1 (2605.03849, from a copy of its code), for images; Reward Forcing (2512.04678) has the first factor alone.

- exp(beta r): r is the mean over rewards, less half the deviation between the rewards of how far each rose over the
  last WINDOW steps, so that one is not bought with another.
- W: how much each pixel matters, |gradient| of each reward, pooled to the latents; softmax(-r_m) over the rewards, so
  that the weakest leads; per image from 0 to 1, no less than FLOOR, over its mean: mean(W) = 1.

Rewards are standardised by running means here, as a network of no known scale gives them. The bound of the exponent is
ours: the code has none, and a weight of 55 is a matter of time. Directions stay, so this re-weighs and does not tilt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.losses.rewards import Rewards
from stepdistill.losses.running_means import StepSums

WINDOW = 50
FLOOR = 0.15
BOUND = 3.0
AXES = 8
"""Rewards at most."""
DECAY = 0.98
"""Of the running means of a reward and its square, at each step."""


def spatial_weights(saliency: Tensor, ranks: Tensor) -> Tensor:
    """W [B, 1, h, w] of mean 1 from the saliency of M rewards [M, B, h, w] and their values [M, B]."""
    lead = (-ranks).softmax(0)[..., None, None]
    seen = (lead * saliency).sum(0)  # [B, h, w]
    low, high = seen.amin((1, 2), keepdim=True), seen.amax((1, 2), keepdim=True)
    one = torch.where(high > low, (seen - low) / (high - low).clamp_min(1e-20), torch.ones_like(seen))
    kept = one.clamp_min(FLOOR)
    return (kept / kept.mean(dim=(1, 2), keepdim=True))[:, None]


class Reweighting(nn.Module):
    """See the module's text. What it has seen moves it after a step, so that all parts of a batch have one scale.

    Args:
        kind: ``reward``, ``saliency`` or ``both``.
        scale: beta.
    """

    moments: Tensor
    window: Tensor
    steps: Tensor

    def __init__(self, kind: str, scale: float) -> None:
        super().__init__()
        self.kind, self.scale = kind, scale
        self.register_buffer("moments", torch.zeros(2, AXES))  # running means of rewards and their squares
        self.register_buffer("window", torch.zeros(WINDOW, AXES))  # of each step, the newest last
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._seen = StepSums()

    def standardised(self, scores: Tensor) -> Tensor:
        """Scores [M, B] in deviations from their running mean; zeros before a step was seen."""
        mean, square = self.moments[:, : len(scores), None]
        deviation = (square - mean.square()).clamp_min(1e-12).sqrt()
        return torch.where(self.steps > 0, (scores - mean) / deviation, torch.zeros_like(scores))

    def penalty(self, axes: int) -> Tensor:
        """Half the deviation between rewards of their rise over the window; 0 before it is full, and of one reward."""
        mean, square = self.moments[:, :axes]
        half = WINDOW // 2
        rise = self.window[half:, :axes].mean(0) - self.window[:half, :axes].mean(0)
        apart = (rise / (square - mean.square()).clamp_min(1e-12).sqrt()).std(correction=0)
        return torch.where(self.steps >= WINDOW, 0.5 * apart, torch.zeros_like(apart))

    @torch.no_grad()
    def weights(self, x: Tensor, rewards: Rewards | None, prompt: Tensor) -> Tensor:
        """Weights of the field at samples x [B, C, H, W]: [B, 1, 1, 1], or [B, 1, H, W] with saliency."""
        assert rewards is not None
        if x.ndim != 4 or len(rewards.each) > AXES:
            raise UserError(
                f"options.reweight is for latents [C, H, W] and {AXES} rewards at most; found {list(x.shape[1:])} and "
                f"{len(rewards.each)}: set it to none"
            )
        if self.kind == "reward":
            scores, saliency = rewards.scores(x, prompt), None
        else:
            scores, saliency = rewards.seen(x, prompt)
        self._see(scores)
        ranks = self.standardised(scores)
        weight = x.new_ones(len(x), 1, 1, 1)
        if self.kind != "saliency":
            exponent = self.scale * (ranks.mean(0) - self.penalty(len(scores)))
            weight = exponent.clamp(-BOUND, BOUND).exp().view(-1, 1, 1, 1)
        if saliency is not None:
            pooled = F.adaptive_avg_pool2d(saliency, (x.shape[2], x.shape[3]))
            weight = weight * spatial_weights(pooled, ranks)
        return weight

    def _see(self, scores: Tensor) -> None:
        """Takes in the scores [M, B] of a part of the batch."""
        sums = F.pad(torch.stack([scores.sum(1), scores.square().sum(1)]), (0, AXES - len(scores)))
        self._seen.add(torch.cat([sums.flatten(), scores.new_full((1,), scores.shape[1])]))

    def update(self) -> None:
        """Moves the running means by what the step has seen, on every process."""
        if (seen := self._seen.take()) is None:
            return
        now = (seen[:-1] / seen[-1]).to(self.moments.dtype).view(2, AXES)
        self.moments.copy_(torch.where(self.steps == 0, now, self.moments.lerp(now, 1 - DECAY)))
        self.window.copy_(torch.cat([self.window[1:], now[:1]]))
        self.steps += 1
