"""Networks of which every process holds a part (FSDP2; Zhao et al. 2023, 2304.11277), and tensors of them in full.

A network is sharded where it is: whoever holds it calls it as before, but all processes call it together, as each call
gathers its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def held_like(whole: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor that it has in full, as it holds ``like``, on its device; parts are left."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    local = whole.to(like.device)
    return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)


def is_sharded(net: nn.Module) -> bool:
    """Whether all processes must call the network together."""
    return isinstance(net, FSDPModule)


def load_whole(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state in full into a network that may be sharded."""
    own = net.state_dict()
    net.load_state_dict({name: held_like(value, own[name]) for name, value in state.items()})


class ShardedNetwork:
    """A network while it is sharded: in the blocks that diffusers does not split, and what is around them.

    Weights travel in the type in which they are held, and autocast rounds them where a call is made, as it does in one
    process: the same weights may be called in bfloat16 and, for a picture or a derivative, in float32. Gradients are
    summed in float32.

    Args:
        net: the network.
        mesh: the processes, in one dimension.
        reshard: whether gathered weights go after each call. Where they do not, :meth:`let_go` is to be called before
            the weights change: a network that has no backward pass, such as a target, would be called with those of its
            first call for ever.
    """

    def __init__(self, net: nn.Module, mesh: DeviceMesh, reshard: bool = True) -> None:
        self.net = net
        # Sharding changes a module's class and its hooks.
        self._before: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = [
            (module, type(module), {k: copy.copy(v) for k, v in vars(module).items() if "hooks" in k})
            for module in net.modules()
        ]
        known = type(net)._no_split_modules if isinstance(net, ModelMixin) else None
        blocks: set[str] = set(known or ())
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in reversed(list(net.modules())):
            if module is net or type(module).__name__ in blocks:
                # Around the blocks, too: see ``reshard``.
                fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)

    def let_go(self) -> None:
        """Frees the weights that calls have gathered."""
        for module, _, _ in self._before:
            if isinstance(module, FSDPModule):
                module.reshard()

    def undo(self, whole: bool, keep: bool) -> None:
        """Ends it, in all processes. Where ``whole`` is true in all of them the network is gathered, and where ``keep``
        is it is whole; elsewhere it has no weights any more and is not to be called."""
        for module, kind, before in self._before:
            for name, value in list(module._parameters.items()):
                if value is not None and isinstance(value, DTensor):
                    own = value.full_tensor().detach() if whole else None
                    left = own if keep and own is not None else torch.empty(0, dtype=value.dtype)
                    module._parameters[name] = nn.Parameter(left, value.requires_grad)
            if keep:
                module.__class__ = kind
                vars(module).update(before)
