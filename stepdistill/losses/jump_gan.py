"""The GAN of SDXL-Lightning (Lin et al. 2024, 2402.13929): whose a jump is, told from features of both its ends."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import accumulate

import torch
from torch import Tensor, nn

from stepdistill.diffusion.remembered import constant
from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch
from stepdistill.losses.gan import Discriminator, own_start
from stepdistill.losses.progressive import Jump
from stepdistill.networks.denoiser import Denoiser


class JumpGan(nn.Module):
    """A head on the features that one network has of where a jump ends and, next to them, of where it starts.

    Clean ends are noised first, to one of a few times: of clean data a network sees little more than texture.

    Args:
        eye: the network; not a part of this module.
        times: to which clean ends are noised, before a flow teacher's shift.
        shares: how often to each, in proportion, where starts are not seen; where they are, equally often.

    Raises:
        UserError: times and shares are not as many, or there are none.
    """

    def __init__(self, eye: Denoiser, times: Sequence[float], shares: Sequence[float]) -> None:
        super().__init__()
        if not times or len(times) != len(shares):
            raise UserError(
                f"options.noise_times are {len(times)} and options.noise_shares {len(shares)}: give at least one time, "
                "and a share for each"
            )
        self.eye, self.times, self.shares = eye, tuple(times), tuple(shares)
        channels, *sides = eye.family.feature_shape(eye.net, eye.shape)
        height, breadth = sides
        with own_start():
            self.head = Discriminator((2 * channels, height, breadth), inner=channels)
        self._start = deepcopy(self.head.state_dict())

    def restart(self) -> None:
        """Gives the head the weights that it started with."""
        self.head.load_state_dict(self._start)

    def logits(self, jump: Jump, ends: Sequence[Tensor], batch: Batch, *, of_start: bool) -> list[Tensor]:
        """Logits [B] of each of ``ends`` [B, ...] at jump.s: at its best, log of the density of real over that of
        generated, given the start.

        Args:
            jump: where and when they started, and with which conditions.
            ends: all of them are noised alike.
            batch: its draws.
            of_start: whether the start is seen; without it 0 takes the place of its features, and the logits are of
                the ends alone.
        """
        eye, draws = self.eye, batch.draws
        shares = [1.0] * len(self.times) if of_start else self.shares
        t, noise = self.looks_at(jump.s, batch, shares), draws.normal("gan eps", tuple(jump.start.shape[1:]))
        seen = [eye.features(eye.path.renoise(end, jump.s, t, noise), t, jump.cond) for end in ends]
        start = eye.features(jump.start, jump.t, jump.cond) if of_start else torch.zeros_like(seen[0])
        channels = 1 if start.ndim == 4 else 2  # of a map, or of a transformer's tokens
        return [self.head(torch.cat([each, start], channels)) for each in seen]

    def looks_at(self, s: Tensor, batch: Batch, shares: Sequence[float]) -> Tensor:
        """The times [B] at which ends at s [B] are seen: s itself, and for s = 0 one of ``times``."""
        upto = [share / sum(shares) for share in accumulate(shares)][:-1]
        which = torch.bucketize(batch.draws.uniform("gan t"), constant(upto, s.device), right=True)
        times = [self.eye.path.shifted(time) for time in self.times]
        return torch.where(s == 0, constant(times, s.device)[which], s)
