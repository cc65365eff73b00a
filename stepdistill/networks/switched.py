"""Several networks of one teacher, each in its own stretch of noise, as one network: Wan 2.2 A14B has two.

One call takes samples of any times. So whatever is done to a network (a copy, adapters, an average, a checkpoint) is
done to all of them together, and nobody else need know that there are several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stepdistill.families._second_time import jumping, told_of
from stepdistill.families.base import Family
from stepdistill.networks.experts import by_time


class SwitchedNetworks(ModelMixin):
    """Networks of one diffusers class and config, called with keywords alone.

    Args:
        networks: from the noisiest stretch down.
        starts: for each the network's own time from which on up it is called, descending; the last is 0.
    """

    _supports_gradient_checkpointing = True

    def __init__(self, networks: Sequence[nn.Module], starts: Sequence[float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.networks = nn.ModuleList(networks)
        self.starts = tuple(starts)
        # A network is called from its start on, and by_time calls one above its bound.
        below = torch.nextafter(torch.tensor(self.starts[:-1]), torch.tensor(-1.0))
        self.bounds: tuple[float, ...] = tuple(below.tolist())

    @property
    def config(self) -> FrozenDict:
        """That of the networks, and what :meth:`from_config` needs beside it."""
        first: Any = self.networks[0]
        return FrozenDict({**first.config, "of": type(first), "starts": self.starts})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SwitchedNetworks:
        """Networks of such a config, with weights of their own."""
        own = {key: value for key, value in config.items() if key not in ("of", "starts")}
        return cls([config["of"].from_config(own) for _ in config["starts"]], config["starts"])

    def called_at(self, times: Tensor) -> list[int]:
        """The numbers of the networks that are called at these of their own times, ascending."""
        return sorted({sum(time <= bound for bound in self.bounds) for time in times.float().tolist()})

    def serving(self, times: Tensor) -> nn.Module:
        """The one network that is called at these of its own times; itself, where they are several."""
        called = self.called_at(times)
        return self.networks[called[0]] if len(called) == 1 else self

    def forward(self, *, timestep: Tensor, **inputs: Any) -> tuple[Tensor]:
        """The outputs [B, ...], each of the network of its time, in the order of the samples.

        Args:
            timestep: [B].
            inputs: tensors [B, ...], or what is said to all.
        """

        def call(k: int, own: Tensor | slice) -> Tensor:
            rows = {name: v[own] if isinstance(v, Tensor) else v for name, v in inputs.items()}
            told = told_of(self.networks[k])
            gap = None if told is None or told.gap is None else told.gap[own]
            with jumping(told, gap):
                output: Tensor = self.networks[k](timestep=timestep[own], **rows)[0]
            return output

        return (by_time(timestep, self.bounds, call),)


def network_of(family: Family, pipe: Any) -> nn.Module:
    """The network of a pipeline: where several share the times, one that calls each at its own."""
    starts = family.stretches(pipe)
    networks = [getattr(pipe, name) for name in starts]
    return networks[0] if len(networks) == 1 else SwitchedNetworks(networks, tuple(starts.values()))


def networks_in(net: nn.Module) -> list[nn.Module]:
    """The networks that a network consists of: itself, but for a switched one."""
    return list(net.networks) if isinstance(net, SwitchedNetworks) else [net]
