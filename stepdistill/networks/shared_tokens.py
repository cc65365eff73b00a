"""Networks of which several processes make one call together, each a part of its tokens (sequence parallelism by
exchanging heads for tokens; Jacobs et al. 2023, 2309.14509), as diffusers' plans split them.

Every process gives the whole input and gets the whole output. In a backward pass each gets what its own tokens add to
the gradients of weights and inputs: their sum over the processes is the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from diffusers import ModelMixin
from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from stepdistill.errors import UserError

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
