"""Several experts as one diffusers network: each is called in its own stretch of timesteps, from the noisiest down.

This file travels inside a student distilled by stepdistill's ``phased_dmd``, or inside a pipeline made by its
``hybrid``, because no stock class of diffusers changes weights between steps. The pipeline around it is stock. It is
loaded with ``trust_remote_code=True``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.modeling_utils import ModelMixin

FILES = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")
"""Arguments of from_pretrained that say where its files are."""


def changed(given: Any, place: Sequence[str], value: torch.Tensor) -> Any:
    """A nest of dicts with the value at ``place`` replaced by one row [1, ...], repeated for each of its own."""
    if not place:
        return value.to(given).expand(len(given), *value.shape[1:])
    return {**given, place[0]: changed(given[place[0]], place[1:], value)}


def joined(one: Any, two: Any) -> Any:
    """Both arguments of a call as one of twice as many samples; None where their rows have two shapes."""
    if isinstance(one, dict):
        both = {name: joined(value, two[name]) for name, value in one.items()}
        return None if any(v is None and one[name] is not None for name, v in both.items()) else both
    if not isinstance(one, torch.Tensor) or not one.ndim:
        return one
    return torch.cat([one, two]) if one.shape[1:] == two.shape[1:] else None


class PhasedExperts(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Experts of one stock class.

    Args:
        network: the experts' class in diffusers, such as UNet2DConditionModel.
        network_config: the config of the last one.
        bounds: descending timesteps, one fewer than there are experts: the first is called above bounds[0], the next
            above bounds[1], the last at or below all.
        changes: what of each expert's config is another; None for experts of one config.
        guidance: the scale with which the first expert is guided, in a call of twice as many samples; None or 1 for
            one that is not.
        null: what it is guided away from, of every argument that a prompt says: its ``place`` among the call's
            keywords, ``shape`` of the one row, ``dtype``.
    """

    # The bare name, also when diffusers has loaded the file as a dynamic module: it is what a saved pipeline writes.
    __module__ = "phased_experts"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        network: str,
        network_config: dict[str, Any],
        bounds: list[float],
        changes: list[dict[str, Any]] | None = None,
        guidance: float | None = None,
        null: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        kind = getattr(diffusers, network)
        self._keep_in_fp32_modules = getattr(kind, "_keep_in_fp32_modules", None)
        self.bounds = list(bounds)
        own = changes or [{} for _ in range(len(bounds) + 1)]
        self.experts = torch.nn.ModuleList(kind.from_config({**network_config, **each}) for each in own)
        self.guidance = guidance
        self.places = [list(each["place"]) for each in null or []]
        for i, each in enumerate(null or []):
            self.register_buffer(f"null_{i}", torch.zeros(each["shape"], dtype=getattr(torch, each["dtype"])))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers loads it; what the experts' class keeps in float32 stays in float32."""
        files = {name: kwargs[name] for name in FILES if name in kwargs}
        config = cls.load_config(pretrained_model_name_or_path, **files)
        kind = getattr(diffusers, config["network"])
        cls._keep_in_fp32_modules = getattr(
            kind, "_keep_in_fp32_modules", None
        )  # diffusers asks the class alone
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        finally:
            cls._keep_in_fp32_modules = None

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """Of each expert, whose class says which layers are left alone."""
        for expert in self.experts:
            expert.enable_layerwise_casting(*args, **kwargs)

    @property
    def config(self) -> FrozenDict:
        """The last expert's config, which pipelines read sizes from, with this network's own entries."""
        own = super().config
        return FrozenDict({**own["network_config"], **own})

    def __getattr__(self, name: str) -> Any:
        """Whatever else a pipeline asks of its network, the last expert answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "experts" not in modules:
                raise
            return getattr(modules["experts"][-1], name)

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
        number = places.pop()
        expert = self.experts[number]

        def call(sample: Any, timestep: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if sample is None:
                return expert(timestep=timestep, **kwargs)
            return expert(sample, timestep, *args, **kwargs)

        if number or self.guidance in (None, 1.0):
            return call(sample, timestep, args, kwargs)
        return self._guided(call, sample, timestep, args, kwargs)

    def _guided(
        self, call: Callable[..., Any], sample: Any, timestep: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """weak + scale (strong - weak): both in one call, or, where prompt and null are of two lengths, in two."""
        weak: Any = kwargs
        for i, place in enumerate(self.places):
            weak = changed(weak, place, getattr(self, f"null_{i}"))
        named = {"sample": sample, "timestep": timestep, "kwargs": kwargs}
        both = joined({**named, "kwargs": weak}, named)
        if both is None:
            found = [call(sample, timestep, args, each) for each in (weak, kwargs)]
            outputs = [self._output(each) for each in found]
        else:
            found = [call(both["sample"], both["timestep"], args, both["kwargs"])]
            outputs = list(self._output(found[0]).chunk(2))
        out = outputs[0] + self.guidance * (outputs[1] - outputs[0])
        if isinstance(found[-1], tuple):
            return (out, *found[-1][1:])
        return type(found[-1])(**{**found[-1], "sample": out})

    @staticmethod
    def _output(said: Any) -> Any:
        return said[0] if isinstance(said, tuple) else said.sample

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Weights, config, and this file, without which they cannot be loaded."""
        super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / "phased_experts.py"
        if Path(__file__).resolve() != target.resolve():
            shutil.copyfile(__file__, target)
