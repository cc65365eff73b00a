"""What the tests of distribution matching share: its methods, and a batch with images and pairs."""

from __future__ import annotations

from dataclasses import replace

import torch

from stepdistill.methods.diff_instruct import DiffInstruct
from stepdistill.methods.dmd import DMD
from stepdistill.methods.f_distill import FDistill
from stepdistill.methods.phased_dmd import PhasedDMD
from stepdistill.methods.sid import SiD
from stepdistill.methods.sim import SIM
from stepdistill.testing.toys import SHAPE, toy_batch

MU, S = 0.7, 0.8

FAMILY = [DMD, DiffInstruct, FDistill, SiD, SIM, PhasedDMD]


def full_batch(count=16, step=5):
    """With images, and pairs of two times whose states lie on straight lines."""
    images = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(3))
    batch = toy_batch(count, step, pairs=lambda z: MU + S * z, images=images)
    states = (0.5 * batch.pairs.noise + 0.5 * batch.pairs.x0)[:, None]
    return replace(batch, pairs=replace(batch.pairs, states=states))
