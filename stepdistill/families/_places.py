"""Where a state may lie in a tensor that a network is given: as the whole of it, or beside something else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where in a tensor a state is: all of it, or what is at ``start`` of the axis in so much of it."""

    axis: int
    start: int
    length: int
    inside: bool

    def parts(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is before the state, the state, and what is after it."""
        end = self.start + self.length
        sides = (self.start, self.length, value.shape[self.axis] - end)
        before, found, after = value.split(sides, self.axis)
        return before, found, after


def places_of(value: Tensor, sample: Tensor) -> list[Place]:
    """Where a state may be in a tensor: it is the tensor, or at either end of a longer axis behind that of B."""
    if value.numel() == sample.numel():
        return [Place(0, 0, len(value), False)]
    longer = [
        axis
        for axis in range(1, value.ndim)
        if value.ndim == sample.ndim and value.shape[axis] > sample.shape[axis]
    ]
    if len(longer) != 1 or any(value.shape[axis] < sample.shape[axis] for axis in range(1, value.ndim)):
        return []
    (axis,), length = longer, sample.shape[longer[0]]
    return [Place(axis, start, length, True) for start in (0, value.shape[axis] - length)]


def multiple_of(found: Tensor, own: Tensor) -> float | None:
    """What a tensor is times another; None where it is no multiple of it."""
    if found.numel() != own.numel():
        return None
    flat, wanted = found.double().flatten(), own.double().flatten()
    factor = float((flat @ wanted) / (wanted @ wanted))
    return factor if (flat - factor * wanted).abs().max() <= 1e-3 * flat.abs().max() else None
