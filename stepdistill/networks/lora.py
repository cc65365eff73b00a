"""LoRA adapters on a frozen network: several on one, switched for a call, found and merged."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.diffusion.draws import generator_for
from stepdistill.errors import UserError
from stepdistill.families._second_time import OWN, Told, add_slots, at_first, jumping, slotted, told_of
from stepdistill.networks.checkpointing import call_twice, checkpointed
from stepdistill.networks.sharding import held_like


def add_lora(net: nn.Module, targets: Sequence[str], rank: int, alpha: float, name: str) -> None:
    """Adds a trainable LoRA adapter to a frozen diffusers network, zero at the start."""
    from diffusers.loaders.peft import PeftAdapterMixin
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))  # type: ignore[arg-type]  # a float serves
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        warnings.filterwarnings(
            "ignore", "TorchaoLoraLinear was instantiated"
        )  # what it lacks is for merging
        if isinstance(net, PeftAdapterMixin):
            net.add_adapter(config, adapter_name=name)
        else:
            inject_adapter_in_model(config, net, adapter_name=name)


def lora_layers(net: nn.Module) -> dict[str, Any]:
    """The layers of a network that carry adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in net.named_modules() if isinstance(module, BaseTunerLayer)}


@torch.no_grad()
def merged_tensors(
    net: nn.Module, name: str | None, exact: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The state of a network with one of its adapters (if any) added to the weights, tensor by tensor, under the names
    of the network without any; what its second time is told through is left out.

    Args:
        net: the network.
        name: the adapter; None is the network alone.
        exact: the network's own state to take in its place, where it is held rounded.
    """
    layers = lora_layers(net) if name else {}
    stock = {k: v for k, v in net.state_dict().items() if ".lora_" not in k and ".slots." not in k}
    own = {key.replace(".base_layer.", "."): v for key, v in stock.items()}
    for key, value in (exact or own).items():
        layer = layers.get(key.removesuffix(".weight"))
        if layer is None or not key.endswith(".weight"):
            yield key, value
        else:
            whole = value.float()
            yield key, whole + layer.get_delta_weight(name).to(whole)


def merged_state(
    net: nn.Module, name: str | None, exact: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The same as a state of its own."""
    return {key: value.clone() for key, value in merged_tensors(net, name, exact)}


class adapter_on(AbstractContextManager[None]):
    """One adapter is on in these layers inside the ``with``, or none; what was on before is on again after it.

    Sets what the layers' forward reads and nothing else: peft's own ``set_adapter`` and ``enable_adapters`` would also
    say what gets gradients, which is the training loop's to say. Can be entered again, also within itself.

    Args:
        layers: of one network, see :func:`lora_layers`.
        name: the adapter; None is the network alone.
        told: of the slots for a second time, which are switched with it; None where there are none.
    """

    def __init__(self, layers: list[Any], name: str | None, told: Told | None = None) -> None:
        self.layers, self.name, self.told = layers, name, told or Told(None)
        self._before: list[tuple[str | None, list[tuple[Any, bool]]]] = []

    def __enter__(self) -> None:
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self.layers]
        self._before.append((self.told.who, before))
        self.told.who, names = self.name, [self.name]
        for layer in self.layers:
            _set(layer, names, self.name is None)

    def __exit__(self, *error: object) -> None:
        self.told.who, layers = self._before.pop()
        for layer, before in zip(self.layers, layers, strict=True):
            _set(layer, *before)


def _set(layer: Any, names: str | list[str | None], off: bool) -> None:
    """What a layer's forward reads; past the module's own ``__setattr__``, which takes ten times as long."""
    fields = vars(layer)
    fields["_active_adapter"], fields["_disable_adapters"] = names, off


class SharedNetwork:
    """A frozen network that several adapters share, each a network of its own where it is on.

    Args:
        net: the network. It stays as it is: what carries the adapters is a network of its own with the same tensors.
        targets: suffixes of the layers that carry adapters.
        exact: the state of ``net`` before its weights were rounded, for merging.

    Attributes:
        net: the network that carries the adapters; all are off outside of a call.
    """

    def __init__(
        self, net: nn.Module, targets: Sequence[str], exact: Mapping[str, Tensor] | None = None
    ) -> None:
        from diffusers import ModelMixin

        if not targets:
            raise UserError(
                f"a {type(net).__name__} has no linear layers in lists of equal blocks that could carry LoRA: set "
                "student.lora_rank=0"
            )
        shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
        self.net = copy.deepcopy(net, dict(shared)).requires_grad_(False)
        self.targets, self.exact = targets, exact
        self.layers: dict[str, Any] = {}
        self._told: Told | None = None
        self._late_blocks: Callable[[nn.Module], nn.Module] | None = None
        if isinstance(self.net, ModelMixin) and self.net.is_gradient_checkpointing:
            own: Any = self.net
            own.enable_gradient_checkpointing(self._call_twice())

    def add(self, name: str, rank: int, alpha: float, trained: bool = True) -> None:
        """A further adapter, in float32, that changes nothing as yet; ``trained`` says whether gradients reach it."""
        from stepdistill.networks.lora_layers import make_lean

        reached = {id(value): value.requires_grad for value in self.net.parameters()}
        add_lora(self.net, self.targets, rank, alpha, name)
        self.layers = lora_layers(self.net)
        for layer in self.layers.values():
            make_lean(layer)
            _set(layer, [None], True)
            layer.lora_A[name].float()
            layer.lora_B[name].float()
        for value in self.net.parameters():
            value.requires_grad_(reached.get(id(value), trained))
        self.reset(name)

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """The weights of an adapter, by names without its own: ``mid_block.attentions.0.proj_in.lora_A.weight``."""
        found: dict[str, nn.Parameter] = {}
        for key, layer in self.layers.items():
            found |= {
                f"{key}.lora_{part}.weight": getattr(layer, f"lora_{part}")[name].weight for part in "AB"
            }
        for key, layer in slotted(self.net).items() if self.has_slots(name) else ():
            own = layer.slots.of[name].named_parameters()
            found |= {f"{key.removesuffix('.base_layer')}.slots.{part}": value for part, value in own}
        return found

    def has_slots(self, name: str) -> bool:
        """Whether the network of an adapter has a second time."""
        late = self._told is not None and name in self._told.late
        return late or any(name in layer.slots.of for layer in slotted(self.net).values())

    def add_slots(self, name: str) -> None:
        """Gives the network of an adapter a second time, see ``families/_second_time.py``, that changes nothing as yet.

        Raises:
            UserError: where the network has no place for it.
        """
        trained = next(iter(self.weights(name).values())).requires_grad
        add_slots(self.net, name, shared=True)
        self._told = told_of(self.net)
        for key, value in self.weights(name).items():
            if ".slots." in key:
                value.requires_grad_(trained)

    def tell_ends(self, name: str, late_blocks: Callable[[nn.Module], nn.Module]) -> None:
        """Tells late blocks the ends of jumps where an adapter is on, see ``families/_late_blocks.py``.

        Args:
            name: the adapter.
            late_blocks: tells those of a network, in place.

        Raises:
            UserError: where it has none.
        """
        if self._told is None:
            late_blocks(self.net)
            self._told, self._late_blocks = told_of(self.net), late_blocks
            assert self._told is not None
            self._told.who = None
            self._told.late.clear()
        self._told.late.add(name)

    def follow_second_time(self, name: str, source: str) -> None:
        """Gives the network of an adapter a second time as that of another has it, where it has one."""
        if self._late_blocks is not None and self.has_slots(source):
            self.tell_ends(name, self._late_blocks)
        elif self.has_slots(source):
            self.add_slots(name)

    def with_slots(self, net: nn.Module, name: str | None) -> nn.Module:
        """Gives an ordinary network the second time of an adapter's, where that has one."""
        if name is not None and self._late_blocks is not None and self.has_slots(name):
            self._late_blocks(net)
        elif name is not None and self.has_slots(name):
            add_slots(net)
            ours = {key.removesuffix(".base_layer"): layer for key, layer in slotted(self.net).items()}
            for key, layer in slotted(net).items():
                layer.slots.of[OWN].load_state_dict(ours[key].slots.of[name].state_dict())
        return net

    def config(self, name: str) -> dict[str, Any]:
        """What peft keeps of an adapter beside its weights: rank, scale, layers."""
        net: Any = self.net
        found: dict[str, Any] = net.peft_config[name].to_dict()
        return found

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Makes an adapter what it was at first: B zero, and A as peft draws it, with numbers that the adapter's name
        and the layer's say; its second time changes nothing."""
        for key, value in self.weights(name).items():
            if ".slots." in key:
                value.copy_(held_like(at_first(key, value.shape), value))
                continue
            if key.endswith(".lora_B.weight"):
                value.zero_()
                continue
            first = torch.empty(value.shape)
            nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator_for("adapter", name, key))
            value.copy_(held_like(first, value))

    @property
    def compute(self) -> torch.dtype | None:
        """What calls are to compute in: weights that are held in bfloat16 take autocast around every one."""
        rounded = any(value.dtype == torch.bfloat16 for value in self.net.parameters())
        return torch.bfloat16 if rounded else None

    def on(self, name: str | None) -> AbstractContextManager[None]:
        """Inside the ``with`` the network is the one with this adapter; None: without any."""
        return adapter_on(list(self.layers.values()), name, self._told)

    def plain(self, name: str | None, device: torch.device | None = None) -> nn.Module:
        """An ordinary network in float32 that says what this one does with the adapter on, or with none, on ``device``
        or where this one is; nothing else is in memory beside it."""
        net: Any = self.net
        plain: nn.Module = type(net).from_config(net.config)
        places = plain.state_dict()
        for key, value in merged_tensors(net, name, self.exact):
            places.pop(key).copy_(value)
        assert not places, places.keys()
        return plain.to(device or next(self.net.parameters()).device).eval()

    def checkpointed(self) -> AbstractContextManager[None]:
        """Inside the ``with`` the network keeps the inputs of its blocks alone for the backward pass, see
        ``checkpointing.py``."""
        return checkpointed([self.net], self._call_twice())

    def _call_twice(self) -> Callable[..., Any]:
        """What calls a block, and again in the backward pass: under the adapter that was on the first time, and the
        second time that it was told, whichever is on by then."""

        @contextmanager
        def again(name: str | None, gap: Tensor | None) -> Iterator[None]:
            with self.on(name), jumping(self._told, gap):
                yield

        def call(block: Callable[..., Any], *args: Any) -> Any:
            layer = next(iter(self.layers.values()), None)
            name = None if layer is None or layer._disable_adapters else layer._active_adapter[0]
            gap = None if self._told is None else self._told.gap
            return call_twice(block, *args, again=lambda: again(name, gap))

        return call


@dataclass(frozen=True)
class Adapter:
    """One of the networks that share one.

    Attributes:
        shared: the network.
        name: which adapter is on in it; None for the network alone.
    """

    shared: SharedNetwork
    name: str | None

    def on(self) -> AbstractContextManager[None]:
        """Inside the ``with`` a call of the shared network is one of this network."""
        return self.shared.on(self.name)

    def plain(self, device: torch.device | None = None) -> nn.Module:
        """An ordinary network in float32 that says the same, on ``device`` or where the shared one is."""
        return self.shared.plain(self.name, device)

    @property
    def has_slots(self) -> bool:
        """Whether the network has a second time."""
        return self.name is not None and self.shared.has_slots(self.name)

    def add_slots(self) -> None:
        """Gives the network a second time."""
        assert self.name is not None
        self.shared.add_slots(self.name)

    def tell_ends(self, late_blocks: Callable[[nn.Module], nn.Module]) -> None:
        """Tells late blocks of the network the ends of jumps."""
        assert self.name is not None
        self.shared.tell_ends(self.name, late_blocks)

    def with_slots(self, net: nn.Module) -> nn.Module:
        """Gives :meth:`plain` the second time of this one, where it has one."""
        return self.shared.with_slots(net, self.name)
