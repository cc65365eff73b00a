"""Several networks for one student, each in its own stretch of times.

No stock diffusers pipeline but Wan's, between two, changes its network on the way, and one stock network with other
weights does not equal two: a UNet or transformer sees its timestep through smooth embeddings alone, which switch no
layer. So elsewhere the network of the student's pipeline is of a class of our own, ``pipelines/phased_experts.py``,
whose file travels beside its weights; the pipeline around it, its call, its scheduler and its other components stay
stock, in every family. LoRA
experts are adapters on one network while they train; what is exported are merged weights, so that no reader needs peft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepdistill.diffusion.remembered import constant


def by_time(t: Tensor, bounds: Sequence[float], call: Callable[[int, Tensor | slice], Tensor]) -> Tensor:
    """The samples' outputs [B, ...] in their order: of expert 0 for t > bounds[0], of the next for t in
    (bounds[1], bounds[0]], and so on.

    Args:
        t: the samples' times [B].
        bounds: descending times in (0, 1), one fewer than there are experts.
        call: gives one expert's output for the rows it is called with.
    """
    which = (t[:, None] <= constant(bounds, t.device)).sum(1)
    used = [int(k) for k in which.unique()]
    if len(used) == 1:
        return call(used[0], slice(None))
    rows = [(which == k).nonzero()[:, 0] for k in used]
    parts = [call(k, own) for k, own in zip(used, rows, strict=True)]
    return torch.cat(parts)[torch.cat(rows).argsort()]
