"""Regression of a student on cached pairs: what a method may start with, or hold on to beside its own loss."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from stepdistill.diffusion.remembered import constant
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import PairOptions
from stepdistill.losses.distances import DistanceName, distance
from stepdistill.networks.student import Student

SETTLING = 100
"""Updates in which regression at a high rate leads a student from the teacher's many steps to its few: what it draws on
the way may be anything. In runs that were healthy after, it was so until update 88 and no more at 96."""


class WarmStartOptions(PairOptions):
    """Options of a method that may start by regression alone; without a warm start it asks for no pairs."""

    pair_distance: DistanceName = "l2"  # distance of the regression on pairs
    warm_start: int = 0  # first updates of the student, by regression alone
    warm_start_lr_ratio: float = 1.0  # their learning rate over train.lr

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"states"} if self.warm_start else super().needs - {"pairs"}

    @property
    def judged_from(self) -> int:
        return min(self.warm_start, SETTLING)


def warm_start_rate(step: int, options: WarmStartOptions) -> float:
    """The student's learning rate over that of ``train``: annealed within the warm start by itself, so that the next
    stage starts from its end; 1 after it."""
    warm = options.warm_start
    return options.warm_start_lr_ratio * annealed(step / warm) if step < warm else 1.0


def ends(
    student: Student, times: tuple[float, ...], batch: Batch, span: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The end that the student sees from a state of each pair's trajectory, and the pair's own, [B, C, H, W] each.

    Args:
        student: learns.
        times: its K times; state 0 of a pair is its noise, state i the cached one at ``times[i]``.
        batch: with pairs, and for K > 1 their states.
        span: the states are drawn, one for each sample, from times[span[0]:span[1]]; default all.
    """
    pairs, (first, last) = cast(Examples, batch.pairs), span or (0, len(times))
    state, index = cast(Tensor, pairs.noise), first + batch.draws.integers("segment", last - first)
    if pairs.states is not None:
        every = torch.cat([state[:, None], pairs.states], 1)  # [B, K, C, H, W]
        state = every[torch.arange(len(index), device=index.device), index]
    t = constant(times, index.device)[index]
    s = torch.zeros_like(t) if student.two_times else None
    return student.predict(state, t, pairs.cond, s).x0, pairs.x0


def regression(
    student: Student,
    times: tuple[float, ...],
    batch: Batch,
    name: DistanceName,
    span: tuple[int, int] | None = None,
) -> Tensor:
    """The distance ``name`` of the two :func:`ends`, a scalar."""
    return distance(*ends(student, times, batch, span), name)


def steps(student: Student, times: tuple[float, ...], batch: Batch) -> tuple[Tensor, Tensor]:
    """The student's clean prediction at a state of each pair's trajectory, and that whose DDIM step leads to the
    trajectory's next state, [B, C, H, W] each: for a student that follows the trajectory, where :func:`ends` is for one
    that sees its end from everywhere.

    Args:
        student: learns.
        times: its K times.
        batch: with pairs, and for K > 1 their states.
    """
    pairs = cast(Examples, batch.pairs)
    noise, index = cast(Tensor, pairs.noise), batch.draws.integers("segment", len(times))
    between = [] if pairs.states is None else list(pairs.states.unbind(1))
    every, rows = torch.stack([noise, *between, pairs.x0], 1), torch.arange(len(index), device=index.device)
    known = constant((*times, 0.0), index.device)
    x, t = every[rows, index], known[index]
    wanted = student.path.through(x, t, every[rows, index + 1], known[index + 1])
    return student.predict(x, t, pairs.cond).x0, wanted.x0


def annealed(done: float) -> float:
    """The half cosine from 1 at done = 0 to 0 at done = 1."""
    return 0.5 * (1 + math.cos(math.pi * done))
