"""What the processes of a run do together: who holds what of its networks, how gradients and numbers are averaged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from stepdistill.networks.sharding import ShardedNetwork, in_full
from stepdistill.system.processes import Processes


def take_turn(trained: dict[str, list[nn.Parameter]], turn: str) -> None:
    """Lets gradients reach the parameters of one network alone."""
    for name, parameters in trained.items():
        for parameter in parameters:
            parameter.requires_grad_(name == turn)


class Parallel(ABC):
    """How the processes of a run share it. Every process calls every function, in the same order.

    Args:
        processes: which one this is, and of how many.
        device: where it computes.

    Class attributes:
        calls_together: whether a network can be called by all processes alone, as each holds a part of it.
    """

    calls_together = False

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self.processes, self.device = processes, device

    @property
    def rank(self) -> int:
        return self.processes.rank

    @property
    def count(self) -> int:
        return self.processes.count

    @property
    def main(self) -> bool:
        """Whether it is the process that writes and shows."""
        return self.processes.main

    def spread(self, networks: Iterable[nn.Module]) -> None:
        """Shares networks out, where they are: once, before optimisers and averages are made of their parameters."""
        return None

    def gather(self) -> None:
        """Takes :meth:`spread` back: the main process has whole networks again, at the end of a run."""
        return None

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in full, for the main process, which gets them; the others get nothing."""
        return dict(tensors) if self.main else {}

    @abstractmethod
    def average(self, parameters: list[nn.Parameter]) -> None:
        """Replaces gradients by their mean over processes, after the backward passes of a step."""

    def norm(self, parameters: list[nn.Parameter], clip: float) -> Tensor:
        """The norm of all their gradients, a scalar, to which they are scaled down where ``clip`` is less; 0 leaves
        them."""
        found = [p.grad for p in parameters if p.grad is not None]
        if any(grad.dtype != torch.float32 for grad in found):
            # The norm of a bfloat16 tensor is one, with three digits.
            found = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in found]
        norm = torch.nn.utils.get_total_norm(found)
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return norm

    def means(self, values: list[float]) -> list[float]:
        """Means over processes; a NaN of any is a NaN of all, so that all stop together."""
        if self.count == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return [value / self.count for value in sums.tolist()]


class OneProcess(Parallel):
    """There is no other."""

    def average(self, parameters: list[nn.Parameter]) -> None:
        return None


class Replicated(Parallel):
    """Every process holds the whole run. Gradients are averaged after the backward passes of a step: networks that take
    turns, adapters and stopped gradients need no wrapper."""

    def average(self, parameters: list[nn.Parameter]) -> None:
        _average(parameters, self.count)


class Sharded(Parallel):
    """Every process holds a part of every network that was spread, of its gradients, moments and average, and each call
    gathers the weights (FSDP2, see stepdistill/networks/sharding.py). Small modules beside them, such as the head of a
    discriminator, are replicated."""

    calls_together = True

    def __init__(self, processes: Processes, device: torch.device) -> None:
        super().__init__(processes, device)
        self._mesh = init_device_mesh(device.type, (processes.count,))
        self._spread: list[ShardedNetwork] = []

    def spread(self, networks: Iterable[nn.Module]) -> None:
        self._spread += [ShardedNetwork(net, self._mesh) for net in networks]

    def gather(self) -> None:
        for network in self._spread:
            network.undo(keep=self.main)
        self._spread.clear()

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in tensors.items():
            whole = in_full(value)  # every process, one tensor after the other
            if self.main:
                found[name] = whole.cpu()
        return found

    def average(self, parameters: list[nn.Parameter]) -> None:
        # The gradients of what was spread are averaged as they are shared out, in the backward pass.
        if replicated := [p for p in parameters if not isinstance(p, DTensor)]:
            _average(replicated, self.count)

    @torch.no_grad()
    def norm(self, parameters: list[nn.Parameter], clip: float) -> Tensor:
        found = [p.grad for p in parameters if p.grad is not None]
        parts = [grad.to_local() for grad in found if isinstance(grad, DTensor)]
        own = [grad for grad in found if not isinstance(grad, DTensor)]
        square = torch.nn.utils.get_total_norm(parts).to(self.device).square()
        torch.distributed.all_reduce(square)
        norm = (square + torch.nn.utils.get_total_norm(own).to(self.device).square()).sqrt()
        if clip:
            torch._foreach_mul_([*parts, *own], (clip / (norm + 1e-6)).clamp_max(1.0))
        return norm


def by_kind(parameters: list[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
    """Groups of an optimiser, in the order of the parameters: none has both sharded and replicated ones, which no fused
    update takes together."""
    return [{"params": list(group)} for _, group in groupby(parameters, lambda p: isinstance(p, DTensor))]


BUCKET_BYTES = 25 * 2**20
"""Gradients that are averaged together, a small part of all: none of them is held twice meanwhile."""


@torch.no_grad()
def _average(parameters: list[nn.Parameter], count: int) -> None:
    """Gradients to their means over all processes, in all-reduces that do not wait for each other. What is summed takes
    the place of the gradients it was made of."""
    sums, under_way = [], []
    for bucket in in_buckets(parameters):
        # As they lie in memory: a gradient lies like its parameter.
        flat = torch.cat([_in_memory(p.grad if p.grad is not None else torch.zeros_like(p)) for p in bucket])
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())
        sums.append(flat)
        under_way.append(torch.distributed.all_reduce(flat, async_op=True))
    for work in under_way:
        work.wait()
    torch._foreach_div_(sums, count)


def in_buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in order, in parts of about ``BUCKET_BYTES`` and of one type each."""
    found: list[list[nn.Parameter]] = []
    room, dtype = 0, None
    for parameter in parameters:
        if room <= 0 or parameter.dtype != dtype:
            found.append([])
            room, dtype = BUCKET_BYTES, parameter.dtype
        found[-1].append(parameter)
        room -= parameter.numel() * parameter.element_size()
    return found


def _in_memory(gradient: Tensor) -> Tensor:
    """A dense tensor's elements in the order in which they lie, [elements], without a copy."""
    return gradient.as_strided((gradient.numel(),), (1,))


KINDS: dict[str, type[Parallel]] = {"auto": Replicated, "replicated": Replicated, "sharded": Sharded}
"""By ``train.parallel``."""


def parallel_of(name: str, processes: Processes, device: torch.device) -> Parallel:
    """What ``train.parallel`` names, for the processes there are."""
    return OneProcess(processes, device) if processes.count == 1 else KINDS[name](processes, device)
