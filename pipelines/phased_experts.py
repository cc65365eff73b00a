"""Several experts as one diffusers network: each is called in its own stretch of timesteps, from the noisiest down.

This file travels inside a student distilled by stepdistill's ``phased_dmd``, because no stock class of diffusers
changes weights between steps. The pipeline around it is stock. It is loaded with ``trust_remote_code=True``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.modeling_utils import ModelMixin


class PhasedExperts(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Experts of one stock class and config.

    Args:
        network: the experts' class in diffusers, such as UNet2DConditionModel.
        network_config: its config.
        bounds: descending timesteps, one fewer than there are experts: the first is called above bounds[0], the next
            above bounds[1], the last at or below all.
    """

    # The bare name, also when diffusers has loaded the file as a dynamic module: it is what a saved pipeline writes.
    __module__ = "phased_experts"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, network: str, network_config: dict[str, Any], bounds: list[float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        kind = getattr(diffusers, network)
        self.bounds = list(bounds)
        self.experts = torch.nn.ModuleList(
            kind.from_config(dict(network_config)) for _ in range(len(bounds) + 1)
        )

    @property
    def config(self) -> FrozenDict:
        """The experts' config, which pipelines read sizes from, with this network's own three entries."""
        own = super().config
        return FrozenDict({**own["network_config"], **own})

    def __getattr__(self, name: str) -> Any:
        """Whatever else a pipeline asks of its network, the first expert answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "experts" not in modules:
                raise
            return getattr(modules["experts"][0], name)

    def forward(
        self, sample: torch.Tensor | None = None, timestep: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The output of the expert of this timestep; arguments as its class has them.

        Raises:
            ValueError: when the timesteps of one batch belong to two experts.
        """
        times = torch.as_tensor(timestep).flatten()
        places = {sum(float(time) <= bound for bound in self.bounds) for time in times.unique()}
        if len(places) != 1:
            raise ValueError(
                f"timesteps {times.tolist()} belong to {len(places)} experts: call each on its own"
            )
        expert = self.experts[places.pop()]
        if sample is None:
            return expert(timestep=timestep, **kwargs)
        return expert(sample, timestep, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Weights, config, and this file, without which they cannot be loaded."""
        super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / "phased_experts.py"
        if Path(__file__).resolve() != target.resolve():
            shutil.copyfile(__file__, target)
