"""Means of several processes' gradients, made while the backward pass goes on (Li et al. 2020, 2006.15704)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
"""Gradients that are averaged together, a small part of all: none of them is held twice meanwhile."""


class GradientMeans:
    """The gradients of one network's parameters, to be replaced by their means over all processes.

    The parameters stand in buckets, the last ones first, as a backward pass comes to them. All processes send the
    buckets in this order, each as soon as all its gradients are there, so that it does not matter which a process has
    first, or not at all. With each bucket goes a number for every parameter that says whether it has a gradient there.
    What no process has a gradient for has none afterwards either, as it would in one process: an optimiser leaves it.

    Args:
        parameters: dense ones.
        count: of processes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], count: int) -> None:
        self.buckets, self._count = in_buckets(parameters[::-1]), count
        self._place = {id(p): i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._open: list[int] | None = None  # of each bucket, the gradients that are still expected
        self._hooked = False
        self._sums: list[Tensor] = []
        # Of each bucket that was sent, what has no gradient here, with its place.
        self._missing: list[list[tuple[int, nn.Parameter]]] = []
        self._under_way: list[torch.distributed.Work] = []

    def expect(self) -> None:
        """Says that the next backward pass completes the gradients."""
        if not self._hooked:
            for bucket in self.buckets:
                for parameter in bucket:
                    parameter.register_post_accumulate_grad_hook(self._came)
            self._hooked = True
        self._open = [len(bucket) for bucket in self.buckets]

    def _came(self, parameter: Tensor) -> None:
        if self._open is not None:
            self._open[self._place[id(parameter)]] -= 1
            while len(self._sums) < len(self.buckets) and not self._open[len(self._sums)]:
                self._send(self.buckets[len(self._sums)])

    @torch.no_grad()
    def finish(self) -> None:
        """Sends what is left, and waits for all of it."""
        self._open = None
        for bucket in self.buckets[len(self._sums) :]:
            self._send(bucket)
        for work in self._under_way:
            work.wait()
        torch._foreach_div_(self._sums, self._count)
        for bucket, flat, missing in zip(self.buckets, self._sums, self._missing, strict=True):
            if missing:  # here: only then is it waited for what the others have
                present = flat[-len(bucket) :].tolist()
                for i, parameter in missing:
                    if not present[i]:
                        parameter.grad = None
        self._sums.clear()
        self._missing.clear()
        self._under_way.clear()

    @torch.no_grad()
    def _send(self, bucket: Sequence[nn.Parameter]) -> None:
        """Starts to sum a bucket's gradients. What is summed takes the place of the gradients it was made of."""
        present = torch.ones(len(bucket), dtype=bucket[0].dtype, device=bucket[0].device)
        missing = [(i, parameter) for i, parameter in enumerate(bucket) if parameter.grad is None]
        for i, _ in missing:
            present[i] = 0
        # As they lie in memory: a gradient lies like its parameter.
        own = [_in_memory(p.grad if p.grad is not None else torch.zeros_like(p)) for p in bucket]
        flat = torch.cat([*own, present])
        for parameter, part in zip(
            bucket, flat.split([*(p.numel() for p in bucket), len(bucket)]), strict=False
        ):
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())
        self._sums.append(flat)
        self._missing.append(missing)
        work = torch.distributed.all_reduce(flat, async_op=True)
        assert work is not None
        self._under_way.append(work)


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
