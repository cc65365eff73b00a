"""Several networks for one student, each in its own stretch of times, and the one network they become when exported.

No stock diffusers pipeline but Wan's changes its network on the way, and one stock network with other weights does not
equal two: a UNet or transformer sees its timestep through smooth embeddings alone, which switch no layer. So the
network of the student's pipeline is of a class of our own, ``pipelines/phased_experts.py``, whose file travels beside
its weights; the pipeline around it, its call, its scheduler and its other components stay stock, in every family. LoRA
experts share their base while they train; what is exported are merged weights, so that no reader needs peft.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """Networks of one layout: the first for t > bounds[0], the next for t in (bounds[1], bounds[0]], and so on.

    Args:
        net: the first expert; the others start as copies of it, with one and the same tensor for what is frozen in it
            (the base of an adapter).
        bounds: descending times in (0, 1), one fewer than there are experts.
    """

    def __init__(self, net: nn.Module, bounds: Sequence[float]) -> None:
        super().__init__()
        shared = {id(value): value for value in net.parameters() if not value.requires_grad}
        self.nets = nn.ModuleList([net, *(copy.deepcopy(net, dict(shared)) for _ in bounds)])
        self.bounds = tuple(bounds)

    def by_time(self, t: Tensor, call: Callable[[nn.Module, Tensor | slice], Tensor]) -> Tensor:
        """The samples' outputs [B, ...] in their order.

        Args:
            t: their times [B].
            call: gives one expert's output for the rows it is called with.
        """
        which = (t[:, None] <= t.new_tensor(self.bounds)).sum(1)
        used = [int(k) for k in which.unique()]
        if len(used) == 1:
            return call(self.nets[used[0]], slice(None))
        rows = [(which == k).nonzero()[:, 0] for k in used]
        parts = [call(self.nets[k], own) for k, own in zip(used, rows, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]
