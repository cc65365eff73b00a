"""Exponential moving averages of weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(target: Sequence[Tensor], source: Sequence[Tensor], decay: float) -> None:
    """target <- decay target + (1 - decay) source, for the weights of two networks of the same layout."""
    pairs = zip(target, source, strict=True)
    ours, theirs = zip(*((a, b.to(a.dtype)) for a, b in pairs if a is not b), strict=True)
    torch._foreach_lerp_(list(ours), list(theirs), 1 - decay)


class Ema:
    """The average of a network's trained weights.

    Args:
        net: the network; only its trainable parameters are averaged.
        decay: in (0, 1). Early on the decay is min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is
            not an average with its own start.
        power: where not 0, the decay of update n is (1 - 1 / n)^(power + 1) instead: the weights of the past fall as a
            power of their age (Karras et al. 2024, 2312.02696, 3.1), and the start is forgotten at the first update.
    """

    def __init__(self, net: nn.Module, decay: float, power: float = 0.0) -> None:
        self.net, self.decay, self.power, self.updates = net, decay, power, 0
        self.shadow = {k: p.detach().float().clone() for k, p in net.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the network's present weights."""
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n))
        if self.power:
            decay = (1 - 1 / (n + 1)) ** (self.power + 1)
        parameters = dict(self.net.named_parameters())
        torch._foreach_lerp_(
            list(self.shadow.values()), [parameters[name].float() for name in self.shadow], 1 - decay
        )
        self.updates += 1

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """The network with averaged weights inside the ``with``, its own after it."""
        parameters = dict(self.net.named_parameters())
        own = {name: parameters[name].detach().clone() for name in self.shadow}
        try:
            for name, value in self.shadow.items():
                parameters[name].copy_(value)
            yield
        finally:
            for name, value in own.items():
                parameters[name].copy_(value)

    def state(self) -> dict[str, Tensor]:
        """The average, by parameter name, and the number of updates."""
        return {**self.shadow, "updates": torch.tensor(self.updates)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores :meth:`state`."""
        self.updates = int(state["updates"])
        for name, value in self.shadow.items():
            value.copy_(state[name])


def averaged(ema: Ema | None) -> AbstractContextManager[None]:
    """The student with its averaged weights inside the ``with``, where there are any."""
    return ema.applied() if ema else nullcontext()
