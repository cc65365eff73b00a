"""What the tests of the reflow family share: the exact student of a Gaussian, and a family with smaller networks."""

from __future__ import annotations

import torch
from torch import nn

from stepdistill.diffusion.path import per_sample
from stepdistill.testing.toys import Perceptron, ToyChanges, ToyFamily

MU, S = 0.7, 0.4


class Straight(nn.Module):
    """The exact x0 of the reflowed Gaussian: on lines from z to mu + s z, z = (x - (1 - t) mu) / ((1 - t) s + t)."""

    def __init__(self, path, error=0.0):
        super().__init__()
        self.path, self.error = path, nn.Parameter(torch.tensor(error))

    def forward(self, x, t, cond):
        alpha, sigma = self.path.alpha_sigma(t)
        time, norm = per_sample(sigma / (alpha + sigma), x), per_sample(alpha + sigma, x)
        return MU + S * (x / norm - (1 - time) * MU) / ((1 - time) * S + time) + self.error


class Slimming(ToyChanges):
    """Perceptrons of 64 channels become slimmer."""

    def slimmer(self, net, width, depth):
        return Perceptron(width=int(64 * width), seed=9)


class Slimmable(ToyFamily):
    changes = Slimming()
