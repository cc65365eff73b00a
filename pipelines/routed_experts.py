"""Several students as one diffusers network: each sample is drawn by the student that learnt its prompt.

This file travels inside a pipeline made by stepdistill's ``join``, because no stock class of diffusers chooses weights
by the prompt. The pipeline around it is stock. A prompt is known by what the network is told of it: the mean of its
tokens, or its class. Its student is that of the nearest prompt of the training, which for one of these is itself.
Every sample costs one student's pass. It is loaded with ``trust_remote_code=True``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.modeling_utils import ModelMixin

FILES = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")
"""Arguments of from_pretrained that say where its files are."""


def told(given: Any, place: Sequence[str]) -> torch.Tensor:
    """What a call says at a place among its keywords, as one row of numbers for each sample [B, D]."""
    for name in place:
        given = given[name]
    rows = given.float()
    return rows.flatten(1, -2).mean(1) if rows.ndim > 2 else rows.reshape(len(rows), -1)


def rows_of(given: Any, rows: torch.Tensor, count: int) -> Any:
    """The chosen samples of an argument; what has not ``count`` rows is for all of them."""
    if isinstance(given, dict):
        return {name: rows_of(value, rows, count) for name, value in given.items()}
    own = isinstance(given, torch.Tensor) and given.ndim > 0 and len(given) == count
    return given[rows] if own else given


class RoutedExperts(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Students of one stock class and config.

    Args:
        network: their class in diffusers, such as UNet2DConditionModel.
        network_config: their config.
        count: how many.
        place: where among the call's keywords a prompt is told.
        prompts, width: of the training: how many, and numbers of each.
    """

    # The bare name, also when diffusers has loaded the file as a dynamic module: it is what a saved pipeline writes.
    __module__ = "routed_experts"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        network: str,
        network_config: dict[str, Any],
        count: int,
        place: list[str],
        prompts: int,
        width: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        kind = getattr(diffusers, network)
        self._keep_in_fp32_modules = getattr(kind, "_keep_in_fp32_modules", None)
        self.place = list(place)
        self.students = torch.nn.ModuleList(kind.from_config(dict(network_config)) for _ in range(count))
        self.register_buffer("anchors", torch.zeros(prompts, width))
        self.register_buffer("owners", torch.zeros(prompts, dtype=torch.int64))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers loads it; what the students' class keeps in float32 stays in float32."""
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
        """Of each student, whose class says which layers are left alone."""
        for student in self.students:
            student.enable_layerwise_casting(*args, **kwargs)

    @property
    def config(self) -> FrozenDict:
        """The students' config, which pipelines read sizes from, with this network's own entries."""
        own = super().config
        return FrozenDict({**own["network_config"], **own})

    def __getattr__(self, name: str) -> Any:
        """Whatever else a pipeline asks of its network, the first student answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "students" not in modules:
                raise
            return getattr(modules["students"][0], name)

    def route(self, said: torch.Tensor) -> torch.Tensor:
        """The student of each sample [B], by what is said of its prompt [B, D]."""
        near = torch.cdist(said.float(), self.anchors.float(), compute_mode="donot_use_mm_for_euclid_dist")
        return self.owners[near.argmin(1)]

    def forward(
        self, sample: torch.Tensor | None = None, timestep: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The samples' outputs in their order, each of its student; arguments as its class has them."""
        whose = self.route(told(kwargs, self.place))
        count, used = len(whose), whose.unique().tolist()
        given = {"sample": sample, "timestep": timestep, "args": dict(enumerate(args)), "kwargs": kwargs}
        rows = [(whose == k).nonzero()[:, 0] for k in used]
        parts = []
        for k, own in zip(used, rows, strict=True):
            part = given if len(used) == 1 else rows_of(given, own, count)
            student, named = self.students[k], part["kwargs"]
            if part["sample"] is None:
                parts.append(student(timestep=part["timestep"], **named))
            else:
                parts.append(student(part["sample"], part["timestep"], *part["args"].values(), **named))
        if len(parts) == 1:
            return parts[0]
        order = torch.cat(rows).argsort()
        if isinstance(parts[0], tuple):
            return (torch.cat([each[0] for each in parts])[order],)
        return type(parts[0])(sample=torch.cat([each.sample for each in parts])[order])

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Weights, config, and this file, without which they cannot be loaded."""
        super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / "routed_experts.py"
        if Path(__file__).resolve() != target.resolve():
            shutil.copyfile(__file__, target)
