"""The network of a hybrid pipeline: the guided teacher's as the first expert, the student's as the others.

It is ``pipelines/phased_experts.py``, which guides by itself from the condition of no prompt that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.export.composed import config_of
from stepdistill.families.watching import watch
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.travelling import travelling_module

_FIRST = ("sample", "hidden_states", "timestep")
"""What networks call the state and their time."""


def guided_experts(
    teacher: PipelineTeacher,
    guidance: float,
    experts: Sequence[Any],
    bounds: Sequence[float],
    null: Sequence[tuple[tuple[str, ...], Tensor]],
) -> nn.Module:
    """The network of the pipeline: the guided teacher's, then these.

    Args:
        teacher: whose network comes first.
        guidance: its scale.
        experts: the student's networks, from high noise to low.
        bounds: the times, as networks are told them, between one expert and the next.
        null: what the teacher is told of no prompt, see :func:`null_rows`.

    Raises:
        UserError: the networks are not of one class.
    """
    first = teacher.family.changes.without_variance(teacher.denoiser.net)
    nets = [first, *experts]
    base = config_of(nets[-1])
    if odd := next((type(net).__name__ for net in nets if type(net) is not type(first)), None):
        raise UserError(
            f"this student's network is a {odd}, and its teacher's a {type(first).__name__}: give its own teacher"
        )
    changes = [
        {key: value for key, value in config_of(net).items() if base.get(key, ...) != value} for net in nets
    ]
    made: nn.Module = travelling_module("phased_experts").PhasedExperts(
        type(first).__name__,
        base,
        list(bounds),
        changes if any(changes) else None,
        guidance,
        [
            {"place": list(place), "shape": list(row.shape), "dtype": str(row.dtype).removeprefix("torch.")}
            for place, row in null
        ],
    )
    state = {f"experts.{i}.{key}": v for i, net in enumerate(nets) for key, v in net.state_dict().items()}
    made.load_state_dict({**state, **{f"null_{i}": row for i, (_, row) in enumerate(null)}})
    return made.to(teacher.device).eval()


def null_rows(teacher: PipelineTeacher, prompt: str) -> list[tuple[tuple[str, ...], Tensor]]:
    """What the network is told of no prompt by the teacher's own pipeline: its place among the call's keywords, and one
    row [1, ...]. Seen in a guided step and in one that is not.

    Raises:
        UserError: the pipeline does not guide so.
    """
    pipe, family, codec = teacher.pipe, teacher.family, teacher.codec

    def calls(guidance: float | None) -> list[dict[tuple[str, ...], Tensor]]:
        given = family.call_arguments(
            type(pipe).__name__, family.call_prompts(pipe, [prompt]), guidance, codec.told_size
        )
        given |= {**family.own_arguments(pipe), "num_inference_steps": 2, **family.grid_arguments(2)}
        given["generator"] = [torch.Generator("cpu").manual_seed(0)]
        found = watch(pipe, given, end_after=1).steps[0].calls
        return [
            {place: row for place, row in _leaves(each.kwargs) if place[0] not in _FIRST}
            for each in found
            if each.network == family.network
        ]

    (plain,), guided = calls(None), calls(2.0)
    halves = guided
    if len(guided) == 1:
        rows = {place: row for place, row in guided[0].items() if len(row) == 2 and place in plain}
        halves = [{place: row[i : i + 1] for place, row in rows.items()} for i in range(2)]
    weak = [each for each in halves if any(not torch.equal(row, plain[place]) for place, row in each.items())]
    if len(halves) != 2 or len(weak) != 1:
        raise UserError(
            f"a {type(pipe).__name__} does not guide by one call with its prompt and one without: give --guidance 1"
        )
    return list(weak[0].items())


def _leaves(given: Any, place: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Tensor]]:
    """The tensors in a nest of dicts, by their places."""
    if isinstance(given, Tensor):
        return [(place, given)] if given.ndim else []
    if isinstance(given, dict):
        return [found for key, value in given.items() for found in _leaves(value, (*place, key))]
    return []
