"""A network with what is needed to call it and to read its output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.diffusion.change_of_path import on_other_path, predict_elsewhere
from stepdistill.diffusion.path import Output, Path, Prediction
from stepdistill.families._second_time import jumping, told_of
from stepdistill.families.base import Family
from stepdistill.families.condition import GAP, GUIDANCE, Condition
from stepdistill.networks.compiled import called_plainly
from stepdistill.networks.experts import by_time
from stepdistill.networks.lora import Adapter
from stepdistill.networks.passes import Counter
from stepdistill.networks.sharding import is_sharded
from stepdistill.networks.switched import SwitchedNetworks


class _Reached(Exception):
    """Ends a network's forward where its features are."""


class Denoiser:
    """A network with what is needed to call it and to read its output.

    Args:
        net: the family's network.
        path: the path its inputs lie on.
        output: what it returns.
        family: how it is called.
        shape: of one state, without B; what a discriminator of its features is made for.
    """

    def __init__(
        self, net: nn.Module, path: Path, output: Output, family: Family, shape: tuple[int, ...] = ()
    ) -> None:
        self.net = net
        self.path = path
        self.output: Output = output
        self.family = family
        self.shape = shape
        # What it computes in, whatever is on around the call; None takes what is on.
        self.compute: torch.dtype | None = None
        # For a teacher's network with embedded guidance, the scale where none is given, and of its copies.
        self.guidance: float | None = None
        # Where the network is one that several share: which of them this is.
        self.adapter: Adapter | None = None
        # Where several networks share the times: who is called in the stretches between the bounds, see experts.py.
        self.experts: tuple[Denoiser, ...] = ()
        self.bounds: tuple[float, ...] = ()
        # Who is told of its calls, and as whose.
        self.counter, self.who = Counter(), "network"

    def raw(self, x_t: Tensor, t: Tensor, cond: Condition, s: Tensor | None = None) -> Tensor:
        """The network's output in its own kind, float32 [B, ...], at x_t [B, ...] and t [B]; s [B] is the end of the
        jump, for a network with a second time."""
        if s is not None:
            ends = self.family.changes.told_ends(self.net)
            cond = cond.with_tensor(GAP, self.family.time(self.path, s) if ends else t - s)
        if self.experts:
            return by_time(
                t, self.bounds, lambda k, own: self.experts[k].raw(x_t[own], t[own], cond.rows(own))
            )
        if self.guidance is not None and cond.get(GUIDANCE) is None:
            cond = cond.with_tensor(GUIDANCE, torch.full_like(t, self.guidance))
        return self._called(x_t, self.family.time(self.path, t), cond)

    def raw_pair(self, x_t: Tensor, t: Tensor, null: Condition, cond: Condition) -> tuple[Tensor, Tensor]:
        """The network's outputs under one condition for all samples and under their own, in one call of 2 B samples:
        each [B, ...] in its own kind, float32, at x_t [B, ...] and t [B]."""
        both, time = null.repeat(len(x_t)).join(cond), self.family.time(self.path, t)
        weak, strong = self._called(torch.cat([x_t, x_t]), torch.cat([time, time]), both).chunk(2)
        return weak, strong

    def _called(self, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """The network's output at its own time [B]."""
        dtype = torch.float32 if self.compute else next(self.net.parameters()).dtype
        tensors = {
            k: v.to(dtype) if v.is_floating_point() and k not in (GUIDANCE, GAP) else v
            for k, v in cond.tensors.items()
        }
        own = nullcontext() if self.adapter is None else self.adapter.on()
        gap = cond.get(GAP)
        told = nullcontext() if gap is None else jumping(told_of(self.net), gap)
        with self._arithmetic(x_t.device.type), own, told:
            said = self.family.call(self.net, x_t.to(dtype), time, Condition(tensors)).float()
        self.counter.count(self.who, len(x_t), graph=said.requires_grad)
        return said

    def _arithmetic(self, device: str) -> torch.autocast:
        """Autocast as it is on around the call, or as ``compute`` says. A cast of a weight that is made without a graph
        is not kept: some versions of torch hand it to a later call with one, and the weight gets no gradient."""
        low = torch.is_autocast_enabled(device) if self.compute is None else self.compute != torch.float32
        dtype = torch.get_autocast_dtype(device) if self.compute is None or not low else self.compute
        return torch.autocast(device, dtype, low, cache_enabled=torch.is_grad_enabled())

    def plain_net(self, device: torch.device | None = None) -> nn.Module:
        """The network; where it is an adapter on a shared one, an ordinary one in float32 that says the same, on
        ``device`` or where that is."""
        if self.adapter is None:
            return self.net
        net = self.adapter.plain(device)
        net = net if self.guidance is None else self.family.changes.fold_guidance(net, self.guidance)
        return self.adapter.with_slots(net)

    def trainable_net(self) -> nn.Module:
        """A copy of the network in float32 for training, without adapters: what one does is in its weights. One with
        embedded guidance has its scale folded in."""
        if self.adapter is not None:
            return self.plain_net().requires_grad_(True)
        net = copy.deepcopy(self.net).float()
        net = net if self.guidance is None else self.family.changes.fold_guidance(net, self.guidance)
        return net.requires_grad_(True)

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition, s: Tensor | None = None) -> Prediction:
        """What the network says about x_t [B, ...] at t [B]; with a second time, for a jump to s [B]."""
        return self.path.read(self.raw(x_t, t, cond, s), self.output, x_t, t)

    def x0_gain(self, times: Sequence[float]) -> float:
        """How far the clean sample moves with the network's output, as root mean square over the times."""
        gain = self.path.x0_gain(self.output, torch.tensor(times))
        return float(gain.square().mean().sqrt())

    def predict_on(
        self, path: Path, x_t: Tensor, t: Tensor, cond: Condition, s: Tensor | None = None
    ) -> Prediction:
        """What the network says about a point of another path, see :func:`predict_elsewhere`; s is on that path too."""

        def predict(x: Tensor, own_t: Tensor) -> Prediction:
            own_s = s if s is None or path == self.path else on_other_path(path, x_t, s, self.path)[1]
            return self.predict(x, own_t, cond, own_s)

        return predict_elsewhere(predict, self.path, path, x_t, t)

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's inner picture of x_t, [B, D, h, w], or [B, N, D] for a transformer; what comes after it in the
        network does not run."""
        return self._seen_in(lambda net: [self.family.features_of(net)], x_t, t, cond)[0]

    def feature_maps(self, x_t: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
        """The same at each of the family's ``feature_layers``."""
        return self._seen_in(self.family.feature_layers, x_t, t, cond)

    def _seen_in(
        self, places: Callable[[nn.Module], list[nn.Module]], x_t: Tensor, t: Tensor, cond: Condition
    ) -> list[Tensor]:
        """What belongs to the picture in the outputs of modules of the network, in the order in which they run."""
        if isinstance(self.net, SwitchedNetworks):
            time, networks = self.family.time(self.path, t), list(map(self._with, self.net.networks))
            sizes = list[torch.Size]()

            def in_one(k: int, own: Tensor | slice) -> Tensor:
                maps = networks[k]._seen_in(places, x_t[own], t[own], cond.rows(own))
                sizes[:] = [each.shape[1:] for each in maps]
                return torch.cat([each.flatten(1) for each in maps], 1)

            flat = by_time(time, self.net.bounds, in_one)
            parts = flat.split([size.numel() for size in sizes], 1)
            return [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]

        # A sharded network runs to its end: there its weights are let go, and gathered for the backward pass.
        whole, seen, wanted = is_sharded(self.net), list[Tensor](), places(self.net)

        def look(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(self.family.picture(self.net, output, tuple(x_t.shape[1:])))
            if len(seen) == len(wanted) and not whole:
                raise _Reached

        said, handles = None, [place.register_forward_hook(look) for place in wanted]
        try:
            with called_plainly(self.net, *wanted):
                said = self.raw(x_t, t, cond)
        except _Reached:
            self.counter.count(self.who, len(x_t), graph=seen[-1].requires_grad)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) < len(wanted):
            raise RuntimeError(f"a {type(self.net).__name__} did not call a module its features come from")
        if len(seen[-1]) < len(x_t):  # prompts of several lengths, with which it is called apart
            rows = [slice(i, i + 1) for i in range(len(x_t))]
            each = [self._seen_in(places, x_t[own], t[own], cond.rows(own)) for own in rows]
            return [torch.cat(maps) for maps in zip(*each, strict=True)]
        return [own.float() if said is None else own.float() + 0 * said.mean() for own in seen]

    def _with(self, net: nn.Module) -> Denoiser:
        """The same with one of the networks that this one switches between."""
        one = copy.copy(self)
        one.net = net
        return one

    def keep_serving(self, times: Sequence[float]) -> bool:
        """Of several networks that share the times, keeps the one that is called at these; false where they are
        several. Adapters lie on all of them as before."""
        if not isinstance(self.net, SwitchedNetworks):
            return True
        net = self.net.serving(self.family.time(self.path, torch.tensor(times)))
        if self.adapter is None:
            self.net = net
        return not isinstance(net, SwitchedNetworks)

    def copy(self) -> Denoiser:
        """An independent trainable copy in float32."""
        made = Denoiser(self.trainable_net(), self.path, self.output, self.family, self.shape)
        made.counter, made.who = self.counter, self.who
        return made


def in_bfloat16(net: nn.Module, *, in_place: bool = False) -> nn.Module:
    """The network with the weights of its linear layers and convolutions in bfloat16, and all others in float32. Under
    autocast it computes bit for bit what float32 weights do, from half the memory.

    Args:
        net: the network.
        in_place: change it, tensor by tensor; else it stays as it is, and this is a copy.
    """
    low = {id(value) for module in matrices(net) for value in (*module.parameters(), *module.buffers())}

    def cast(value: Tensor) -> Tensor:
        dtype = torch.bfloat16 if id(value) in low else torch.float32
        return value.detach().to(dtype if value.is_floating_point() else value.dtype, copy=not in_place)

    if not in_place:
        made: dict[int, Any] = {id(v): nn.Parameter(cast(v), v.requires_grad) for v in net.parameters()}
        return copy.deepcopy(net, made | {id(value): cast(value) for value in net.buffers()})
    for module in net.modules():
        for value in module._parameters.values():
            if value is not None:
                value.data = cast(value)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = cast(buffer)
    return net


def matrices(net: nn.Module) -> list[nn.Module]:
    """The layers whose weights autocast rounds: linear layers and convolutions."""
    return [each for each in net.modules() if isinstance(each, nn.Linear | nn.modules.conv._ConvNd)]
