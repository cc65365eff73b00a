"""What steps of a watched draw say: where the output is, which time the network is told, how states are laid out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill.diffusion.path import Path, TablePath
from stepdistill.diffusion.shift import shifted
from stepdistill.families._arguments import Unlike
from stepdistill.families._places import places_of
from stepdistill.families.recorded import Clock, Reading
from stepdistill.families.watching import Call, Draw, Step

NO_LORA = ("norm", "mod", "adaln", "ada", "time", "scale_shift", "gate", "router")
"""Parts of names of linear layers that stand beside a block's attention and feed-forward layers."""

AT_LENGTH = ", at the length of what is not guided"


def layout_of(one: Draw, other: Draw, factor_in: float) -> tuple[tuple[int, ...], Tensor | None]:
    """The shape of a state as its noise is drawn, and where in it each value of the scheduler's sample stands."""
    packed = [draw.steps[0].sample.double().flatten().cpu() for draw in (one, other)]
    for noise, second in zip(one.noises, other.noises, strict=False):
        drawn = [value.double().flatten().cpu() for value in (noise, second)]
        if len(drawn[0]) != len(packed[0]) or noise.shape[0] != 1:
            continue
        factor = float(packed[0].norm() / drawn[0].norm())
        if all(torch.allclose(a, factor * b, atol=1e-3 * factor) for a, b in zip(packed, drawn, strict=True)):
            order = None
        else:
            # Where each value went: equal ones are told apart by those of the second draw.
            went, stood = (np.lexsort([value.numpy() for value in lots]) for lots in (packed, drawn))
            order = torch.empty(len(went), dtype=torch.long)
            order[torch.from_numpy(went)] = torch.from_numpy(stood)
            if not all(torch.equal(a, b[order]) for a, b in zip(packed, drawn, strict=True)):
                continue
        if abs(factor * factor_in - 1) > 0.02:
            raise Unlike(f"it starts from {factor:.4g} times standard normal noise")
        return tuple(noise.shape[1:]), order
    raise Unlike("its first sample is no rearranged standard normal draw of one generator")


def clock_of(path: Path, steps: list[Step], told: list[float]) -> Clock:
    """The network's time as a line in the scheduler's; on a flow path in t, if need be before a shift."""
    times = [step.timestep for step in steps]
    unit, bend = (1.0, 1.0) if isinstance(path, TablePath) else (1000.0, 1.0)
    u = [time / unit for time in times]
    sigmas = [step.sigma for step in steps]
    if unit == 1000 and any(s is not None and abs(s - v) > 2e-3 for s, v in zip(sigmas, u, strict=True)):
        t = [s or 0.0 for s in sigmas]
        bend = t[-1] * (1 - u[-1]) / (u[-1] * (1 - t[-1]))
        if any(abs(shifted(v, bend) - s) > 1e-4 for v, s in zip(u, t, strict=True)):
            raise Unlike(f"its scheduler's times {_few(u)} are no shift of its noise levels {_few(t)}")
    if len(set(u)) < 2:
        raise Unlike("the times of its steps are all the same")
    scale = float(f"{(told[-1] - told[0]) / (u[-1] - u[0]):.5g}")
    offset = (
        float(f"{told[0] - scale * u[0]:.4g}") if abs(told[0] - scale * u[0]) > 1e-4 * abs(scale) else 0.0
    )
    near = 1e-4 * max(abs(value) for value in told)
    if any(abs(scale * v + offset - value) > near for v, value in zip(u, told, strict=True)):
        raise Unlike(
            f"the network is told {_few(told)} at its scheduler's times {_few(times)}: no straight line"
        )
    return Clock(scale, offset, bend)


def passes_in(grid: Mapping[str, Any], steps: int) -> set[str]:
    """What of ``Family.passes`` a pipeline hands to ``set_timesteps`` in a draw of so many steps."""
    found = {"mu"} & grid.keys()
    sigmas, timesteps = (grid.get(name) for name in ("sigmas", "timesteps"))
    if timesteps is not None:
        usual = np.allclose(timesteps, np.linspace(1000, 1, steps), atol=1)
        found |= {"sigmas", "timesteps"} if usual and sigmas is not None else {"own sigmas"}
    elif sigmas is not None:
        found |= {"sigmas"} if np.allclose(sigmas, np.linspace(1, 1 / steps, steps)) else {"own sigmas"}
    return found


def shift_in(path: Path, draw: Draw, config: Any) -> float | None:
    """Of the times of its own schedule, where the pipeline computes it; None where its scheduler's config says."""
    if isinstance(path, TablePath) or "mu" not in draw.grid or not config.get("use_dynamic_shifting"):
        return None
    mu = float(draw.grid["mu"])
    return mu if config.get("time_shift_type") == "linear" else float(np.exp(mu))


def rows_of_call(call: Call, sample: Tensor) -> int:
    """For how many states a network was called: the values of its longest state-like argument over the sample's."""

    def sizes(value: Any) -> Iterator[int]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            if all(isinstance(inner, list) and len(inner) == 1 for inner in value):
                value = [inner[0] for inner in value]  # each state alone in a list of its own
            if value and all(isinstance(inner, Tensor) for inner in value):
                yield sum(inner.numel() for inner in value)
            else:
                for inner in value:
                    yield from sizes(inner)
        elif isinstance(value, Tensor):
            yield value.numel()
            for place in places_of(value, sample)[:1]:
                yield place.parts(value)[1].numel()

    found = set(sizes([*call.args, None, call.kwargs]))  # no list of tensors itself
    return 1 if sample.numel() in found else 2 if 2 * sample.numel() in found else 0


def reading_of(steps: list[Step]) -> Reading:
    """Where in what the network returns the scheduler's ``model_output`` is."""
    shape = tuple(steps[0].sample.shape[1:])
    outputs = [step.calls[-1].output for step in steps]
    for path, listed, value in _leaves(outputs[0], ()):
        for half, last in _parts(value, steps[0].mean):
            for sign in (1.0, -1.0):
                reading = Reading(path, listed, half, sign, last)
                pairs = zip(outputs, steps, strict=True)
                if all(near(reading.of(output, shape), step.mean) for output, step in pairs):
                    return reading
    raise Unlike(
        "what its scheduler is given is neither what its network returns, nor that negated, nor its half, nor the end "
        "of its sequence"
    )


def _parts(value: Tensor, used: Tensor) -> list[tuple[int | None, int | None]]:
    """The ``half`` and ``last`` of readings that make of what a network returns as many numbers as are used."""
    axes = range(1, value.ndim)
    if value.numel() == used.numel():
        return [(None, None)]
    longer = [axis for axis in axes if value.ndim == used.ndim and value.shape[axis] > used.shape[axis]]
    ends = [
        (None, axis)
        for axis in longer
        if value.numel() * used.shape[axis] == used.numel() * value.shape[axis]
    ]
    return [*[(axis, None) for axis in axes if value.numel() == 2 * used.numel()], *ends]


def _leaves(output: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], bool, Tensor]]:
    if isinstance(output, Tensor):
        yield path, False, output
    elif isinstance(output, list) and len(output) == 1 and isinstance(output[0], Tensor):
        yield path, True, output[0][None]
    elif isinstance(output, (list, tuple, dict)):
        keys = output if isinstance(output, dict) else range(len(output))
        for key in keys:
            yield from _leaves(output[key], (*path, key))


def goes_back(steps: list[Step]) -> bool:
    """Whether a first step of Euler's goes against what it is given: a scheduler that is told each token's own time
    counts from the next noise level to this one, and its pipeline hands over the velocity negated."""
    if len(steps) < 2 or (one := steps[0]).sigma is None or (then := steps[1].sigma) is None:
        return False
    return one.output.shape == one.sample.shape and near(
        one.result, one.sample + (one.sigma - then) * one.output
    )


def linear_layers(net: nn.Module) -> tuple[str, ...]:
    """The linear layers inside lists of equal blocks, by their whole names."""
    lists = [
        name
        for name, part in net.named_modules()
        if isinstance(part, nn.ModuleList) and len({type(block) for block in part}) == 1
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return tuple(
        name
        for name, part in net.named_modules()
        if isinstance(part, nn.Linear)
        and any(name.startswith(f"{each}.") for each in outer)
        and not any(word in name for word in NO_LORA)
    )


def near(ours: Tensor, wanted: Tensor) -> bool:
    """Equal up to the rounding of their type."""
    allowed = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 3e-2
    ours, wanted = ours.float(), wanted.float()
    return ours.shape == wanted.shape and bool(
        (ours - wanted).abs().max() <= allowed * wanted.abs().max().clamp_min(1e-3)
    )


def same_start(one: Tensor, other: Tensor) -> bool:
    """Whether two conditions [1, L, ...] are equal as far as the shorter goes."""
    length = min(one.shape[1], other.shape[1]) if one.ndim > 1 else None
    return (
        torch.allclose(one[:, :length].double(), other[:, :length].double(), atol=1e-4)
        if length
        else bool(torch.equal(one, other))
    )


def guidance_in(said: Tensor, c: Tensor, u: Tensor, scale: float) -> str:
    """How outputs for a prompt and for a null became what was said at a scale, in words; none for the usual way."""
    if near(said, u + scale * (c - u)):
        return ""
    if near(said, c + scale * (c - u)):
        return " (its scale is one less)"
    guided = u + scale * (c - u)
    if near(said, guided * (c.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))):
        return AT_LENGTH
    return " (which it also changes otherwise, and that is left out)"


def _few(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
