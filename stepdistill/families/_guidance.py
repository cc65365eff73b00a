"""How a pipeline guides, found in a guided draw of it beside the recording of an unguided one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from stepdistill.families._arguments import state_rows
from stepdistill.families._findings import AT_LENGTH, guidance_in, same_start
from stepdistill.families._guiders import guided_plainly, guiders_of
from stepdistill.families.recorded import Recorded, Recording, two_prompts
from stepdistill.families.watching import Call, Draw


def guidance_of(
    draws: Callable[..., Draw],
    pipe: Any,
    kind: type[Recorded],
    found: Recording,
    off: Mapping[str, float],
    turned: int,
) -> tuple[Recording, str]:
    """The recording with what guidance starts from, and in words how the pipeline guides.

    Args:
        draws: draws with prompts, seeds and more arguments of the call, and maybe another pipeline.
        pipe: the pipeline.
        kind: the family so far; of it is noted whether guidance keeps the length of what is not guided.
        found: the recording without guidance.
        off: the arguments that switch guidance off.
        turned: -1 where the scheduler is given the network's output negated, else 1.
    """
    calls, scale, words = list[Call](), 5.0, "none"
    prompt = two_prompts(kind.has_prompts)[0]
    own = inspect.signature(type(pipe).__call__).parameters.get("negative_prompt")
    # Its own default first, where that is none: SDXL takes zeros for it, and not an empty prompt.
    tries = [{}] if own is None or own.default is None else list[dict[str, Any]]()
    tries += [{"negative_prompt": [""]}] if own is not None else []
    guided_pipe, left_out = guided_plainly(pipe, scale)
    for negative in tries if off or guiders_of(pipe) else ():
        try:
            draw = draws(
                [prompt],
                [0],
                {**dict.fromkeys(off, scale), **negative},
                guided_pipe,
                end_after=1,
            )
        except Exception as error:  # an empty prompt is not everywhere one
            words = f"none (guided, its call fails: {type(error).__name__})"
            continue
        calls = [call for call in draw.steps[0].calls if call.network == kind.network]
        rows = [state_rows(found.template, call.nest) or 1 for call in calls]
        if sum(rows) == 2:
            break
    else:
        return found, words
    outs = torch.cat([found.reading.of(call.output, found.packed) for call in calls])
    family = kind(found)
    both = [family.conditions(call.nest, count) for call, count in zip(calls, rows, strict=True)]
    lone = [both[0].rows(slice(i, i + 1)) for i in (0, 1)] if len(both) == 1 else both
    prompts = family.encode(pipe, [prompt], found.size)
    alike = [all(same_start(prompts[name], value) for name, value in row.tensors.items()) for row in lone]
    if sum(alike) != 1:
        return found, "none (which of two calls is the prompt's cannot be told)"
    if lone[0].tensors.keys() != lone[1].tensors.keys():
        return found, "none (what is not guided is called with other arguments)"
    c, u = outs[alike.index(True)], outs[alike.index(False)]
    found = replace(found, null=lone[alike.index(False)])
    said = turned * draw.steps[0].mean[:1]
    how = guidance_in(said[0], c, u, scale)
    kind.keeps_length = how == AT_LENGTH
    return found, f"{'by negative prompt' if own else 'by a null of its own'}{left_out}{how}"
