"""Several experts as one exported network, whose class travels along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from stepdistill.system.travelling import travelling_module


def one_network(nets: Sequence[nn.Module], timesteps: Sequence[float]) -> nn.Module:
    """The exported component: a diffusers network made of stock ones.

    Args:
        nets: the experts, stock diffusers networks of one config; their weights are copied.
        timesteps: the bounds between them in the network's own time, descending.
    """
    config: Any = nets[0].config
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    made: nn.Module = travelling_module("phased_experts").PhasedExperts(
        type(nets[0]).__name__, plain, list(timesteps)
    )
    made.load_state_dict(
        {f"experts.{i}.{k}": v for i, net in enumerate(nets) for k, v in net.state_dict().items()}
    )
    return made.to(next(nets[0].parameters()).device).eval()
