"""A second time for networks of any class: an embedding of t - s, zero at the start, beside that of the timestep.

What embeds a timestep ends in a linear layer. A slot adds to its output [B, D] what an MLP makes of sinusoids of t - s,
so everything that reads the time also reads the length of the jump, and a student's own few jumps can be folded into
the layer itself. A network in which every block embeds the time (DiT) has a slot in each. A network that several
roles share holds a slot for each role that has one, beside its adapter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from stepdistill.diffusion.draws import generator_for
from stepdistill.errors import UserError

GAP_SCALE = 100.0
"""A gap times this goes through the sinusoids, a tenth of the scale of diffusers' timesteps: gaps of 1 / 100 are told
apart, and derivatives in s stay a tenth as steep."""

GAP_DIM = 128
"""Width of the sinusoids of a gap; another width than that of guidance, so that a network says which it takes."""

TIMES = ("t_embedder", "distilled_guidance_layer")
"""What diffusers also calls a module that embeds a timestep; the second is Chroma's, for every layer of it."""

OWN = "own"
"""Whose slot it is where a network is not shared."""


def sinusoid(phase: Tensor, width: int) -> Tensor:
    """Sines and cosines [B, width] of phase [B] at rates from 1 down to 1 / 10000."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=phase.device) * -(torch.log(torch.tensor(1e4)) / (half - 1)))
    angle = phase[:, None] * rates[None]
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)


class GapEmbedding(nn.Module):
    """t - s [B] to [B, D]; 0 at the start.

    Args:
        width: D.
        key: says the random numbers of its first weights.
    """

    def __init__(self, width: int, key: str) -> None:
        super().__init__()
        self.first: nn.Linear = skip_init(nn.Linear, GAP_DIM, width)
        self.last: nn.Linear = skip_init(nn.Linear, width, width)
        with torch.no_grad():
            for name, value in self.named_parameters():
                value.copy_(at_first(f"{key}.{name}", value.shape))

    def forward(self, gap: Tensor) -> Tensor:
        phases = sinusoid(GAP_SCALE * gap.float(), GAP_DIM).to(self.first.weight.dtype)
        embedded: Tensor = self.last(F.silu(self.first(phases)))
        return embedded


def at_first(name: str, shape: torch.Size) -> Tensor:
    """The first values of a slot's parameter, by its name: all are 0 but the weights of its first layer."""
    value = torch.zeros(shape)
    if name.endswith("first.weight"):
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator_for("second time", name))
    return value


class Told:
    """What the slots of one network are told, or its late blocks.

    Attributes:
        who: whose are on; None for none.
        late: where it is late blocks that are told, see ``_late_blocks.py``: who has such; else empty.
        gap: t - s [B] of the present call, or for late blocks the network's own time at s; None is a jump of no length,
            the instantaneous velocity.
    """

    def __init__(self, who: str | None) -> None:
        self.who, self.late = who, set[str]()
        self.gap: Tensor | None = None


class Hears(nn.Module):
    """What is told of a jump.

    Attributes:
        told: shared by all of a network.
    """

    def __init__(self, told: Told) -> None:
        super().__init__()
        self.told = told


class Slots(Hears):
    """The slots beside one layer.

    Attributes:
        of: one for each who has a second time.
    """

    def __init__(self, told: Told) -> None:
        super().__init__(told)
        self.of = nn.ModuleDict()

    def forward(self, said: Tensor) -> Tensor:
        """What the layer said, [B, ..., D], with what is added to it."""
        who, gap = self.told.who, self.told.gap
        if who is None or who not in self.of:
            return said
        added = self.of[who](said.new_zeros(len(said)) if gap is None else gap)
        beside: Tensor = added.view(len(added), *(1,) * (said.ndim - 2), -1).to(said.dtype)
        return said + beside


def _beside(layer: Any, args: Any, said: Tensor) -> Tensor:
    """The hook of a layer that has slots."""
    told: Tensor = layer.slots(said)
    return told


def slotted(net: nn.Module) -> dict[str, Any]:
    """The layers of a network that have slots, by name."""
    return {name: m for name, m in net.named_modules() if isinstance(m._modules.get("slots"), Slots)}


def told_of(net: nn.Module) -> Told | None:
    """What a network's slots or late blocks are told; None for a network without any."""
    return next((module.told for module in net.modules() if isinstance(module, Hears)), None)


def add_slots(net: nn.Module, who: str = OWN, *, shared: bool = False) -> None:
    """Gives a network its second time, in place; nothing changes at the start.

    Args:
        net: the network, with adapters or without.
        who: whose slots they are.
        shared: whether they are off until ``Told.who`` says who calls.

    Raises:
        UserError: where nothing in the network embeds a time.
    """
    layers, told = slotted(net), told_of(net) or Told(None if shared else who)
    for name, layer in (layers or _last_layers(net)).items():
        if not layers:
            layer.add_module("slots", Slots(told))
            layer.register_forward_hook(_beside)
        slot = GapEmbedding(layer.out_features, f"{name.removesuffix('.base_layer')}.slots")
        layer.slots.of[who] = slot.to(layer.weight.device)


def _last_layers(net: nn.Module) -> dict[str, Any]:
    """The last linear layer of everything in a network that embeds a time, by name."""
    known = {name: module for name, module in net.named_modules() if _embeds_time(name, module)}
    found: dict[str, Any] = {}
    for name, module in known.items():
        if any(other.startswith(f"{name}.") for other in known):
            continue
        found |= dict([(f"{name}.{inner}", layer) for inner, layer in _linear(module).items()][-1:])
    if not found:
        raise UserError(
            f"this method needs a network with a second time, but a {type(net).__name__} has no layers that embed its "
            "timestep: take a method with one time, such as dmd"
        )
    return found


def _embeds_time(name: str, module: nn.Module) -> bool:
    """Whether a module is named as diffusers names what embeds a timestep, and has layers to do so."""
    last = name.rpartition(".")[2]
    return (last.startswith("time") or last in TIMES) and bool(_linear(module))


def _linear(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers in a module but for those of adapters, by name."""
    named = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    return {n: m for n, m in named.items() if n not in ("", "base_layer") and ".lora_" not in f".{n}"}


@contextmanager
def jumping(told: Told | None, gap: Tensor | None) -> Iterator[None]:
    """Inside the ``with`` the slots are told t - s [B], late blocks the network's own time at s."""
    if told is None:
        yield
        return
    before, told.gap = told.gap, gap
    try:
        yield
    finally:
        told.gap = before


@torch.no_grad()
def folded(net: nn.Module, gap: float | None, call: Callable[[], object]) -> nn.Module:
    """A copy without slots: what they add goes into biases, or into weights.

    Where every t - s is ``gap`` and the layers have biases, it equals the network at any time. Elsewhere it does at the
    times t at which ``call`` calls it: what comes to such a layer depends on t alone, so there is a change of its
    weights, and this is the least, that adds to the layer's output at each t what the slot does there.

    Args:
        net: with slots of its own.
        gap: t - s of all jumps; None where they differ.
        call: calls the network at the start of every jump, and tells it the jump's length.
    """
    layers = slotted(net)
    within = gap is not None and all(layer.bias is not None for layer in layers.values())

    def added(layer: Any, output: Tensor) -> Tensor:
        return cast(Tensor, layer.slots.of[OWN](layer.slots.told.gap))

    seen = {} if within else met(layers, call, added)
    plain = copy.deepcopy(net)
    for name, layer in slotted(plain).items():
        if within:
            device = layer.weight.device
            layer.bias += layer.slots.of[OWN](torch.tensor([gap], device=device))[0].to(layer.bias)
        elif name in seen:  # of several networks, one may have no jump
            inputs, lacking = seen[name]
            layer.weight += (torch.linalg.pinv(inputs) @ lacking).T.to(layer.weight)
        del layer.slots
        hooks = layer._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is _beside]:
            del hooks[key]
    return plain


def met(
    layers: dict[str, Any], call: Callable[[], object], said: Callable[[Any, Tensor], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What comes to layers in a call, [K, D'], and what is asked of them there, [K, D]; float64, on the CPU. Those that
    the call does not reach are left out.

    Args:
        layers: by name.
        call: calls their network.
        said: from a layer and its output, what is asked.
    """
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def look(layer: Any, args: tuple[Tensor], output: Tensor, name: str) -> None:
        rows[name].append((args[0].double().cpu(), said(layer, output).double().cpu()))

    handles = [layer.register_forward_hook(partial(look, name=name)) for name, layer in layers.items()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (torch.cat([x for x, _ in each]), torch.cat([y for _, y in each]))
        for name, each in rows.items()
        if each
    }
