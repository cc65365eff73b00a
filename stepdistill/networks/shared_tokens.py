"""Networks of which several processes make one call together, each a part of its tokens (sequence parallelism by
exchanging heads for tokens; Jacobs et al. 2023, 2309.14509), as diffusers' plans split them.

Every process gives the whole input and gets the whole output. In a backward pass each gets what its own tokens add to
the gradients of weights and inputs: their sum over the processes is the gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed
from diffusers import ModelMixin
from diffusers.hooks.context_parallel import (
    _get_submodule_by_name,
    apply_context_parallel,
    remove_context_parallel,
)
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from stepdistill.errors import UserError
from stepdistill.families.size import Size
from stepdistill.networks.teacher import PipelineTeacher

FAILS = ("LTXVideoTransformer3DModel",)
"""Have a plan that diffusers 0.42 cannot follow: the mask of LTX is split before attention wants it whole."""


def check_shared_tokens(net: nn.Module, share: int) -> None:
    """Refuses a network whose calls cannot be shared by so many processes.

    Raises:
        UserError: diffusers has no plan for it, or its heads do not divide.
    """
    name = type(net).__name__
    if not isinstance(net, ModelMixin) or net._cp_plan is None or name in FAILS:
        raise UserError(
            f"train.context_parallel is {share}, but diffusers has no plan that splits a {name}'s tokens: set it to 1"
        )
    for module in net.modules():
        if isinstance(module, Attention | AttentionModuleMixin) and module.heads % share:
            raise UserError(
                f"train.context_parallel is {share}, which does not divide the {module.heads} heads of a {name}: set "
                "it to a divisor"
            )


def check_split(teacher: PipelineTeacher, share: int, sizes: Sequence[Size], prompt: str) -> None:
    """Calls the teacher's network once at each size, alone, and refuses what so many processes could not share evenly.

    Raises:
        UserError: a number of tokens does not divide.
    """
    for size in sizes:
        codec = replace(teacher.codec, size=size)
        x_t, t = torch.zeros(1, *codec.shape, device=teacher.device), torch.ones(1, device=teacher.device)
        with torch.no_grad(), _watched(teacher.denoiser.net, share, str(size)):
            teacher.denoiser.raw(x_t, t, codec.encode([prompt]))


@contextmanager
def _watched(net: nn.Module, share: int, size: str) -> Iterator[None]:
    """Inside the ``with`` a call of the network looks at all that its plan would split, and splits nothing."""

    def look(name: str, value: Any, plan: Any) -> None:
        if isinstance(value, list | tuple):
            for each, own in zip(value, plan, strict=True):
                look(name, each, own)
            return
        counted = isinstance(value, Tensor) and plan.expected_dims in (None, value.dim())
        if counted and (count := value.shape[plan.split_dim]) % share:
            raise UserError(
                f"train.context_parallel is {share}, which does not divide the {count} tokens that a "
                f"{type(net).__name__} has in {name} at {size}: set it to a divisor, or to 1"
            )

    def watch(path: str, module: nn.Module, splits: dict[Any, Any]) -> list[Any]:
        names = inspect.signature(module.forward)

        def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = names.bind_partial(*args, **named).arguments
            for name in splits.keys() & given.keys():
                look(name, given[name], splits[name])

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found = [output] if isinstance(output, Tensor) else output
            for place in splits:
                if isinstance(place, int):
                    look(path, found[place], splits[place])

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    assert isinstance(net, ModelMixin)
    plan: Any = net._cp_plan
    hooks: list[Any] = []
    for path, splits in plan.items():
        if isinstance(splits, dict):
            found: Any = _get_submodule_by_name(net, path)
            for module in found if isinstance(found, list) else [found]:
                hooks += watch(path, module, splits)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Summed(torch.autograd.Function):
    """The same tensor, whose gradient is the sum of all processes' parts."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(whole, group=ctx.group)
        return whole, None


class SharedTokens:
    """A network while its calls are shared.

    Args:
        net: see :func:`check_shared_tokens`.
        mesh: of all processes, with dimensions "ring", of one, and "ulysses", of those that share a call.
    """

    def __init__(self, net: nn.Module, mesh: DeviceMesh) -> None:
        assert isinstance(net, ModelMixin)
        self.net = net
        plan: Any = net._cp_plan
        self._plan = plan
        own = ContextParallelConfig(ulysses_degree=mesh["ulysses"].size(), mesh=mesh)
        config = ParallelConfig(context_parallel_config=own)
        rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
        config.setup(rank, count, torch.device(mesh.device_type), mesh=mesh)
        group = mesh["ulysses"].get_group()

        def summed(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            return tuple(_summed(each, group) for each in args), {
                k: _summed(v, group) for k, v in named.items()
            }

        self._attend(config)
        apply_context_parallel(net, own, plan)
        self._hook = net.register_forward_pre_hook(summed, with_kwargs=True)

    def undo(self) -> None:
        """Ends it: the network is one that a process calls alone."""
        self._hook.remove()
        remove_context_parallel(self.net, self._plan)
        self._attend(None)

    def _attend(self, config: ParallelConfig | None) -> None:
        for module in self.net.modules():
            if isinstance(module, Attention | AttentionModuleMixin):
                processor: Any = module.processor
                processor._parallel_config = config


def _summed(value: Any, group: Any) -> Any:
    """A tensor or a list of them that gradients reach, see :class:`_Summed`; anything else as it is."""
    if isinstance(value, list):
        return [_summed(each, group) for each in value]
    wants = isinstance(value, Tensor) and value.requires_grad
    return _Summed.apply(value, group) if wants else value
