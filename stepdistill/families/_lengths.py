"""Networks without a mask: what pads a prompt would be read as text, so prompts of one length go in at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stepdistill.families._second_time import jumping, told_of
from stepdistill.families.condition import GAP, MASK, Condition


def padded(name: str, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Sequences of several lengths [L, ...] as one condition [B, L, ...], with a mask beside it."""
    ones = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
    both = {name: rows, f"{name}.{MASK}": ones}
    return {key: pad_sequence(list(values), batch_first=True) for key, values in both.items()}


def length_by_length(
    net: nn.Module,
    names: Sequence[str],
    call: Callable[[Tensor, Tensor, Condition], Tensor],
    x_t: Tensor,
    time: Tensor,
    cond: Condition,
) -> Tensor:
    """What a network says, called with the samples whose prompts are as long as each other at a time.

    Args:
        net: the network, whose second time is that of the present samples.
        names: conditions that :func:`padded` made.
        call: calls it, at states, times and conditions without padding.
        x_t, time, cond: of all samples.
    """
    lengths = torch.stack([cond[f"{name}.{MASK}"].sum(1) for name in names], 1)
    kinds, kind_of = lengths.unique(dim=0, return_inverse=True)
    said, places = list[Tensor](), list[Tensor]()
    for i, kind in enumerate(kinds.tolist()):
        rows = (kind_of == i).nonzero()[:, 0]
        own = dict(cond.rows(rows).tensors)
        own |= {name: own[name][:, :length] for name, length in zip(names, kind, strict=True)}
        with jumping(told_of(net), own.get(GAP)):
            said.append(call(x_t[rows], time[rows], Condition(own)))
        places.append(rows)
    return torch.cat(said)[torch.cat(places).argsort()]
