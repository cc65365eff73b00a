"""The roles of a network's arguments, found by comparing calls of it: state, time, guidance, conditions, constants.

A template is a nest of dicts, tuples and lists as the call's, with a role at every leaf. It takes the conditions out of
a call and makes a call of given ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.families._places import multiple_of, places_of
from stepdistill.families.condition import GAP, GUIDANCE, Condition


class Unlike(Exception):
    """What was found that no recording can repeat."""


@dataclass(frozen=True)
class Given:
    """What a call is made of.

    Attributes:
        sample: states as the scheduler sees them [B, ...].
        time: the network's own [B].
        scale: of guidance [B], for a network that takes it.
        cond: the conditions.
    """

    sample: Tensor
    time: Tensor
    scale: Tensor
    cond: Condition


@dataclass(frozen=True)
class Role:
    """A leaf.

    Attributes:
        kind: what stands there; a "constant each" is a list of it for each of the B samples.
        value: of a constant.
        name: of a condition.
        axis: of B in a condition's tensor; None where it has none and one prompt's serves for all of its length. Of a
            state that has something beside it, the axis along which it stands.
        each: rows of it that belong to one sample, as where every frame of a video has its own.
        listed: lists that a tensor of each of the B samples lies in, in place of one tensor of all: 1, or 2 where
            each lies alone in a list of its own.
        sequence: the axis of a condition's row, without B, that is as long as the prompt.
        shape: of one row of a state, a time or a scale, without B.
        factor: of a state, or of a scale of guidance.
        beside: what stands before and after a state, the same for all of them.
    """

    kind: Literal["constant", "constant each", "state", "time", "scale", "condition"]
    value: Any = None
    name: str = ""
    axis: int | None = 0
    each: int = 1
    listed: int = 0
    sequence: int = 0
    shape: tuple[int, ...] = ()
    factor: float = 1.0
    beside: tuple[Tensor, ...] = ()

    def fill(self, given: Given) -> Any:
        """What the network is given here."""
        if self.kind == "constant":
            return self.value.to(given.sample.device) if isinstance(self.value, Tensor) else self.value
        if self.kind == "constant each":
            return [self.value] * len(given.sample)
        if self.kind == "state":
            rows = given.sample.reshape(-1, *self.shape)
            rows = rows if self.factor == 1 else self.factor * rows
            if self.beside:
                before, after = (part.to(rows).expand(len(rows), *part.shape[1:]) for part in self.beside)
                return torch.cat([before, rows, after], self.axis or 0)
            return _as_list(rows, self.listed) if self.listed else rows
        if self.kind in ("time", "scale"):
            value = given.time if self.kind == "time" else self.factor * given.scale
            return value.view(-1, *[1] * len(self.shape)).expand(-1, *self.shape) if self.shape else value
        value = given.cond[self.name]
        value = value.movedim(1, 1 + self.sequence) if self.sequence else value
        if self.axis is None:
            return value[0]
        if self.each > 1:
            return value.flatten(0, 1)
        return _as_list(value, self.listed) if self.listed else value.movedim(0, self.axis).contiguous()

    def take(self, value: Any, rows: int) -> list[Tensor]:
        """The B rows of a condition out of what the network was given here."""
        if self.listed:
            return [inner[0] for inner in value] if self.listed == 2 else list(value)
        if self.each > 1:
            return list(value.unflatten(0, (rows, self.each)))
        found = [value] * rows if self.axis is None else list(value.movedim(self.axis, 0))
        return [row.movedim(self.sequence, 0) for row in found] if self.sequence else found


@dataclass
class Calls:
    """Calls of a network, by whose differences roles are found; each as one nest of its arguments.

    Attributes:
        one: by one prompt, at the first step.
        later: the same prompt's, at later steps.
        other: another prompt's.
        two: both prompts together.
        scaled: the first prompt's at other scales of guidance, with these.
        samples: states, as the scheduler saw them, of ``one`` and ``later``.
        scales: factors of states that change with the step, as those of Euler's schedulers.
        times: names of the found times, and what the network was told at each step.
        states: names of the found states.
        embedded: names of the found scales of guidance.
    """

    one: Any
    later: list[Any]
    other: Any
    two: Any
    scaled: list[tuple[float, Any]]
    samples: list[Tensor]
    scales: list[float]
    times: dict[str, list[float]] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)
    embedded: list[str] = field(default_factory=list)

    def template(self) -> Any:
        """The roles.

        Raises:
            Unlike: an argument has none.
        """
        found = self._node((), self.one, self.later, self.other, self.two, self.scaled)
        if len(self.states) != 1:
            raise Unlike(f"{len(self.states)} arguments of its network, not one, are its scheduler's sample")
        if len(self.times) != 1:
            raise Unlike(f"{len(self.times)} arguments of its network, not one, change as a time would")
        return found

    def _node(self, path: tuple[str, ...], one: Any, later: Any, other: Any, two: Any, scaled: Any) -> Any:
        def alike(value: Any) -> bool:
            return type(value) is type(one) and len(value) == len(one)

        def inner(key: Any, own: Any) -> Any:
            if not all(alike(value) for value in (*later, other)):
                raise Unlike(f"its argument {_name(path)} changes its length")
            theirs = two[key] if alike(two) else None
            at_scales = [(scale, value[key]) for scale, value in scaled if alike(value)]
            then = [value[key] for value in later]
            return self._node((*path, str(key)), own, then, other[key], theirs, at_scales)

        if isinstance(one, dict):
            return {key: inner(key, own) for key, own in one.items()}
        if isinstance(one, (list, tuple)):
            if isinstance(two, list) and len(one) == 1 and len(two) == 2:  # one of each prompt
                return self._listed(path, one, later, other)
            return type(one)([inner(key, own) for key, own in enumerate(one)])
        if isinstance(one, Tensor) or (isinstance(one, float | int) and not isinstance(one, bool)):
            return self._tensor(path, one, later, other, two, scaled)
        if any(value != one for value in (*later, other)):
            raise Unlike(f"its argument {_name(path)} changes and is no tensor: {one!r}, {other!r}")
        return Role("constant", one)

    def _listed(self, path: tuple[str, ...], one: Any, later: Any, other: Any) -> Role:
        name, deep = _name(path), 1
        own, then = one[0], [value[0] for value in later]
        if isinstance(own, list) and len(own) == 1 and isinstance(own[0], Tensor):
            own, then, deep = own[0], [value[0] for value in then], 2
        if isinstance(own, Tensor):
            if (state := self._state(name, own, then, listed=deep)) is not None:
                return state
            return Role("condition", name=_free(name), listed=deep)
        if any(value != one for value in (*later, other)):
            raise Unlike(f"its argument {name} changes and is no list of tensors")
        return Role("constant each", own)

    def _tensor(
        self, path: tuple[str, ...], one: Any, later: list[Any], other: Any, two: Any, scaled: Any
    ) -> Role:
        name, value = _name(path), torch.as_tensor(one)
        if isinstance(one, Tensor) and (state := self._state(name, one, later, listed=0)) is not None:
            return state
        axis = _batch_axis(value, two)
        shape = () if value.numel() == 1 else tuple(value.shape[1:] if axis == 0 else value.shape)
        if not all(_equal(value, then) for then in later):
            told = [torch.as_tensor(then).double().flatten() for then in (one, *later)]
            if any(len(then) == 0 or (then != then[0]).any() for then in told):
                raise Unlike(f"its argument {name} changes from step to step and is neither state nor time")
            self.times[name] = [float(then[0]) for then in told]
            return Role("time", shape=shape)
        if value.is_floating_point() and (factor := _factor(scaled)):
            self.embedded.append(name)
            return Role("scale", factor=factor, shape=shape)
        sequence = _sequence_axis(value, other, axis)
        if axis is not None:
            return Role("condition", name=_free(name), axis=axis, sequence=sequence)
        if isinstance(two, Tensor) and two.shape == (2 * value.shape[0], *value.shape[1:]):
            return Role("condition", name=_free(name), each=len(value))
        if _equal(value, other):
            return Role("constant", one)
        if not isinstance(one, Tensor):
            raise Unlike(f"its argument {name} changes with the prompt and is no tensor")
        return Role("condition", name=_free(name), axis=None, sequence=sequence)

    def _state(self, name: str, one: Tensor, later: Sequence[Any], listed: int) -> Role | None:
        """The role of a tensor that is the scheduler's sample, times a factor, or has it among others."""
        if not all(isinstance(then, Tensor) and then.shape == one.shape for then in later):
            return None
        for place in places_of(one, self.samples[0]):
            parts = [place.parts(value) for value in (one, *later)]
            factors = [
                multiple_of(found, scale * sample)
                for (_, found, _), sample, scale in zip(parts, self.samples, self.scales, strict=True)
            ]
            known = [factor for factor in factors if factor]
            beside = parts[0][::2] if place.inside else ()
            if len(known) < len(factors) or (
                place.inside and not all(_all_equal(beside, then[::2]) for then in parts)
            ):
                continue
            if max(known) - min(known) > 1e-3 * abs(known[0]):
                times = ", ".join(f"{factor:.3g}" for factor in known)
                raise Unlike(
                    f"its argument {name} is its scheduler's sample times another factor at each step: {times}"
                )
            self.states.append(name)
            return Role(
                "state",
                axis=place.axis,
                listed=listed,
                shape=tuple(parts[0][1].shape if listed else parts[0][1].shape[1:]),
                factor=1.0 if abs(known[0] - 1) < 1e-3 else known[0],
                beside=beside,
            )
        return None


def fill(node: Any, given: Given) -> Any:
    """A call's arguments."""
    if isinstance(node, Role):
        return node.fill(given)
    if isinstance(node, dict):
        return {key: fill(inner, given) for key, inner in node.items()}
    return type(node)(fill(inner, given) for inner in node)


def take(node: Any, value: Any, rows: int) -> dict[str, list[Tensor]]:
    """The conditions of a call's arguments, each as B rows; an unguided half may leave arguments out."""
    if isinstance(node, Role):
        return {node.name: node.take(value, rows)} if node.kind == "condition" else {}
    keys = [key for key in node if key in value] if isinstance(node, dict) else range(len(node))
    return {name: found for key in keys for name, found in take(node[key], value[key], rows).items()}


def state_rows(node: Any, value: Any) -> int | None:
    """How many states a call's arguments hold; None for a nest without one."""
    if isinstance(node, Role):
        return len(value) if node.kind == "state" else None
    keys = [key for key in node if key in value] if isinstance(node, dict) else range(len(node))
    return next((rows for key in keys if (rows := state_rows(node[key], value[key])) is not None), None)


def _name(path: tuple[str, ...]) -> str:
    """What a leaf is called: its keyword, or its place among the arguments without one."""
    return ".".join(path[1:] if path[:1] == ("kwargs",) else path)


def _free(name: str) -> str:
    return f"{name}_" if name in (GUIDANCE, GAP) else name


def _all_equal(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def _equal(one: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor | float | int):
        return False
    value = torch.as_tensor(other)
    return one.shape == value.shape and torch.equal(one, value.to(one.device))


def _batch_axis(one: Tensor, two: Any) -> int | None:
    """The first axis that one prompt has once and two have twice."""
    if not isinstance(two, Tensor) or two.ndim != one.ndim:
        return None
    pairs = enumerate(zip(one.shape, two.shape, strict=True))
    return next((axis for axis, sides in pairs if sides == (1, 2)), None)


def _sequence_axis(one: Tensor, other: Any, batch: int | None) -> int:
    """The axis, without that of B, whose length alone goes by the prompt; the first where there is none."""
    if not isinstance(other, Tensor) or other.ndim != one.ndim:
        return 0
    rows = [[side for axis, side in enumerate(each.shape) if axis != batch] for each in (one, other)]
    changed = [axis for axis, (side, its) in enumerate(zip(*rows, strict=True)) if side != its]
    return changed[0] if len(changed) == 1 else 0


def _as_list(rows: Tensor, deep: int) -> list[Any]:
    """A list of tensors, or of lists of one tensor each."""
    return [[row] for row in rows] if deep == 2 else list(rows)


def _factor(scaled: Sequence[tuple[float, Any]]) -> float | None:
    """The multiple of each scale of guidance that a value held under it: 1, or the thousand of some networks."""
    ratios = [
        torch.as_tensor(value).double().flatten() / scale for scale, value in scaled if value is not None
    ]
    if len(ratios) < 2:
        return None
    all_of = torch.cat(ratios)
    constant = len(all_of) > 0 and (all_of - all_of[0]).abs().max() < 1e-5 * all_of[0].abs()
    return round(float(all_of[0]), 4) if constant else None
