"""A second time without new weights: late blocks of a network are told the end of a jump, the others its start.

Decoupled MeanFlow (2510.24474) makes a flow map of a pretrained transformer so: its early blocks encode x_t and are
told t, its late ones make of that what is to be said for s. Where s = t nothing has changed. What a late block does
with a time goes through linear layers that see nothing else, so that what they say of the ends of a student's own jumps
can be written into them, and a stock network that is told t alone says the same there.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from stepdistill.errors import UserError
from stepdistill.families._second_time import OWN, Hears, Told, met, told_of


class Ends(Hears):
    """What tells a late block the end of a jump.

    Args:
        told: shared by all late blocks of a network.
        block: the block.
        argument: of the block's forward, that is a time.
        embedding: what the network's own time goes through before it is handed to the block.
        reads: how the names of the block's linear layers end that see a time and nothing else.
    """

    def __init__(
        self, told: Told, block: nn.Module, argument: str, embedding: Sequence[nn.Module], reads: str
    ) -> None:
        super().__init__(told)
        self.argument, self.reads = argument, reads
        self.place = list(inspect.signature(block.forward).parameters).index(argument)
        self.embedding = tuple(embedding)  # no modules of the block: they are the network's

    def forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the block with the end of the jump in the place of its start."""
        end = self.told.gap
        if self.told.who not in self.told.late or end is None:
            return args, kwargs
        for module in self.embedding:
            weight = next(module.parameters(), None)
            end = module(end if weight is None else end.to(weight.dtype))
        if self.argument in kwargs:
            return args, {**kwargs, self.argument: end}
        return (*args[: self.place], end, *args[self.place + 1 :]), kwargs

    def readers(self, block: nn.Module) -> dict[str, nn.Linear]:
        """The linear layers of the block that see a time and nothing else, by name."""
        named = block.named_modules()
        return {name: m for name, m in named if isinstance(m, nn.Linear) and name.endswith(self.reads)}


def _told_end(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hook of a late block."""
    return block.ends(args, kwargs)


def tell_ends(blocks: Iterable[nn.Module], argument: str, embedding: Sequence[nn.Module], reads: str) -> None:
    """Tells late blocks of a network the ends of jumps, in place; see :class:`Ends`."""
    told = Told(OWN)
    told.late.add(OWN)
    for block in blocks:
        block.add_module("ends", Ends(told, block, argument, embedding, reads))
        block.register_forward_pre_hook(_told_end, with_kwargs=True)


def unet_decoder(net: Any) -> nn.Module:
    """A U-Net whose way up is told the ends of jumps: the paper has transformers alone, and it is a U-Net's decoder.

    Raises:
        UserError: where more than the time is embedded, of which no layer of a stock network sees the time alone.
    """
    beside = {
        "its class": getattr(net, "class_embedding", None),
        "texts or sizes": getattr(net, "add_embedding", None),
        "guidance": net.config.get("time_cond_proj_dim"),
    }
    for what, module in beside.items():
        if module is not None:
            raise UserError(
                f"options.second_time=late_blocks needs a network that embeds its time alone, but this "
                f"{type(net).__name__} embeds {what} beside it: set it to embedded"
            )
    act = getattr(net, "time_embed_act", None)
    embedding = [net.time_proj, net.time_embedding, *([] if act is None else [act])]
    tell_ends(net.up_blocks, "temb", embedding, "time_emb_proj")
    return net  # type: ignore[no-any-return]


@torch.no_grad()
def folded_ends(net: nn.Module, call: Callable[[], object]) -> nn.Module:
    """A copy whose blocks are all told the start of a jump, which equals the network at the jumps that ``call`` makes.

    What comes to a layer that reads a time depends on t alone. For one jump the change goes into its bias; for several,
    or where it has none, it is the least change of its weights that makes it say at each t what it says of the jump's
    end.

    Args:
        net: with late blocks of its own.
        call: calls the network at the start of every jump, and tells it the jump's end.
    """
    told = told_of(net)
    assert told is not None
    ends = [(name, m.get_submodule("ends")) for name, m in net.named_modules() if "ends" in m._modules]
    layers = {
        f"{name}.{inner}": layer
        for name, own in ends
        if isinstance(own, Ends)
        for inner, layer in own.readers(net.get_submodule(name)).items()
    }
    of_ends = met(layers, call, lambda layer, output: output)
    told.who, before = None, told.who
    try:
        of_starts = met(layers, call, lambda layer, output: output)
    finally:
        told.who = before
    plain = copy.deepcopy(net)
    for name, (inputs, said) in of_starts.items():
        layer: Any = plain.get_submodule(name)
        lacking = of_ends[name][1] - said
        if len(lacking) == 1 and layer.bias is not None:
            layer.bias += lacking[0].to(layer.bias)
        else:
            layer.weight += (torch.linalg.pinv(inputs) @ lacking).T.to(layer.weight)
    for name, _ in ends:
        block: Any = plain.get_submodule(name)
        del block.ends
        for key in [key for key, hook in block._forward_pre_hooks.items() if hook is _told_end]:
            del block._forward_pre_hooks[key]
            block._forward_pre_hooks_with_kwargs.pop(key)
    return plain
