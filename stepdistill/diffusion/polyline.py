"""A solver's trajectory as the line it is: with Euler's steps straight between its states, on the straight path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepdistill.diffusion.path import per_sample


class Polyline:
    """Trajectories through the states of a solver, straight in between.

    A DDIM step holds (x0, eps) fixed and an Euler step the velocity, so on the straight path either is a straight line
    at the velocity of its start, and the trajectory is known at every time from its states. For solvers of higher
    order the lines are chords.

    Args:
        states: [B, n + 1, ...] on the straight path.
        times: theirs, falling, [n + 1].
    """

    def __init__(self, states: Tensor, times: Tensor) -> None:
        self.states, self.times = states, times
        self._rows = torch.arange(len(states), device=states.device)

    @classmethod
    def of(
        cls, states: Tensor, times: Tensor, onto: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Polyline:
        """From states [B, n + 1, ...] and times [n + 1] of any path; ``onto`` carries a state [B, ...] and its time [B]
        to the straight one."""
        carried = [
            onto(state, time.expand(len(state))) for state, time in zip(states.unbind(1), times, strict=True)
        ]
        return cls(torch.stack([x for x, _ in carried], 1), torch.stack([t[0] for _, t in carried]))

    def _segment(self, t: Tensor) -> Tensor:
        """The number [B] of the line that holds t [B]; at a state, of the line that starts there."""
        before = torch.searchsorted(-self.times, -t.contiguous(), right=True) - 1
        return before.clamp(0, len(self.times) - 2)

    def velocity(self, t: Tensor) -> Tensor:
        """dx/dt [B, ...] at t [B]."""
        i = self._segment(t)
        rise = self.states[self._rows, i] - self.states[self._rows, i + 1]
        return rise / per_sample(self.times[i] - self.times[i + 1], rise)

    def at(self, t: Tensor) -> Tensor:
        """The states [B, ...] at t [B]."""
        i = self._segment(t)
        start = self.states[self._rows, i]
        return start - per_sample(self.times[i] - t, start) * self.velocity(t)
