"""Exponential moving averages of weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from stepdistill.networks.sharding import held_like


@torch.no_grad()
def follow(target: Sequence[Tensor], source: Sequence[Tensor], decay: float) -> None:
    """target <- decay target + (1 - decay) source, for the weights of two networks of the same layout."""
    pairs = zip(target, source, strict=True)
    ours, theirs = zip(*((a, b.to(a.dtype)) for a, b in pairs if a is not b), strict=True)
    torch._foreach_lerp_(list(ours), list(theirs), 1 - decay)


class Ema:
    """The average of a network's trained weights.

    Args:
        weights: the network's, by name.
        decay: in (0, 1). Early on the decay is min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is
            not an average with its own start.
        power: where not 0, the decay of update n is (1 - 1 / n)^(power + 1) instead: the weights of the past fall as a
            power of their age (Karras et al. 2024, 2312.02696, 3.1), and the start is forgotten at the first update.
        exact: what is averaged, by the same names, where the weights themselves are rounded; None is the weights.
        device: where the average lies; None is beside the weights.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        decay: float,
        power: float = 0.0,
        exact: Mapping[str, Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.weights, self.decay, self.power, self.updates = dict(weights), decay, power, 0
        self._exact = dict(exact or weights)
        self.shadow = {
            name: value.detach().to(device or value.device).float().clone()
            for name, value in self._exact.items()
        }

    @property
    def present_decay(self) -> float:
        """That of the next update."""
        n = self.updates
        return (1 - 1 / (n + 1)) ** (self.power + 1) if self.power else min(self.decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the network's present weights."""
        decay = self.present_decay
        now = [self._exact[name].to(value.device).float() for name, value in self.shadow.items()]
        torch._foreach_lerp_(list(self.shadow.values()), now, 1 - decay)
        self.updates += 1

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Averaged weights are in the network inside the ``with``, its own again after it."""
        own = {name: value.detach().clone() for name, value in self.weights.items()}
        try:
            for name, value in self.shadow.items():
                self.weights[name].copy_(value)
            yield
        finally:
            for name, value in own.items():
                self.weights[name].copy_(value)

    def state(self) -> dict[str, Tensor]:
        """The average, by parameter name, and the number of updates."""
        return {**self.shadow, "updates": torch.tensor(self.updates)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores :meth:`state`."""
        self.updates = int(state["updates"])
        for name, value in self.shadow.items():
            value.copy_(held_like(state[name], value))


def averaged(ema: Ema | None) -> AbstractContextManager[None]:
    """The student with its averaged weights inside the ``with``, where there are any."""
    return ema.applied() if ema else nullcontext()
