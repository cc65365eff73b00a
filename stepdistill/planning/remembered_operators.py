"""What an operator makes of tensors without numbers, by their shapes and types: worked out once, made again at will."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class HasNumbers(Exception):
    """Numbers are among what an operator is given, or something whose equal is not known."""


ANEW = object()
"""Of an operator: it must be asked each time."""

PLAIN = frozenset(
    {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
)


class Result(NamedTuple):
    """One result.

    Attributes:
        given: the place of the argument that it is, or whose storage it looks at.
        shape, stride, offset, dtype, device: of the tensor; a shape of None is the argument itself, or None.
        attributes: of the fake tensor.
    """

    given: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    attributes: dict[str, Any] = {}  # noqa: RUF012


def told(value: Any) -> Any:
    """What of an argument its results depend on, as a key.

    Raises:
        HasNumbers: see there.
    """
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.dtype.is_complex:
            raise HasNumbers
        return (value.shape, value.stride(), value.storage_offset(), value.dtype, value._fake_device)
    if kind in PLAIN:
        # 1, 1.0 and True are equal, but not what is made of them
        return value if kind is not int and kind is not float and kind is not bool else (kind, value)
    if kind is torch.Generator:
        return kind
    if kind is tuple or kind is list or kind is torch.Size:
        return (kind, *map(told, value))
    raise HasNumbers


def tensors_in(args: Any, place: tuple[int, ...] = ()) -> list[tuple[tuple[int, ...], Tensor]]:
    """Tensors among arguments, with their places."""
    found: list[tuple[tuple[int, ...], Tensor]] = []
    for number, value in enumerate(args):
        if isinstance(value, Tensor):
            found.append(((*place, number), value))
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value, (*place, number))
    return found


def argument(args: Any, place: tuple[int, ...]) -> Any:
    """The argument at a place."""
    for number in place:
        args = args[number]
    return args


def recipe_of(func: Any, made: Any, args: Any, kwargs: Any) -> Any:
    """How what was made is made again: a :class:`Result`, a list or tuple of such, or ANEW."""
    tags = getattr(func, "tags", ())
    if (
        getattr(func, "namespace", "") != "aten"
        or torch.Tag.data_dependent_output in tags
        or torch.Tag.dynamic_output_shape in tags
        or torch.Tag.inplace_view in tags
        or any(isinstance(value, Tensor) for value in kwargs.values())
    ):
        return ANEW
    places = tensors_in(args)
    results = made if isinstance(made, (list, tuple)) else (made,)
    found, storages = [], set[int]()
    for value in results:
        if value is None:
            found.append(Result())
            continue
        if type(value) is not FakeTensor or value.constant is not None or value.is_conj() or value.is_neg():
            return ANEW
        same = [place for place, given in places if given is value]
        key = value.untyped_storage()._cdata
        looked = [place for place, given in places if given.untyped_storage()._cdata == key]
        if same:
            found.append(Result(same[0]))
            continue
        if (not looked and key in storages) or value.layout is not torch.strided:
            return ANEW
        storages.add(key)
        found.append(
            Result(
                looked[0] if looked else None,
                tuple(value.shape),
                tuple(value.stride()),
                int(value.storage_offset()),
                value.dtype,
                value.fake_device,
                dict(vars(value)),
            )
        )
        if not looked and value.untyped_storage().nbytes() != _bytes(value):
            return ANEW
    if isinstance(made, (list, tuple)):
        return found if isinstance(made, list) else tuple(found)
    return found[0]


def _bytes(value: Tensor) -> int:
    """That a tensor of its own takes."""
    last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return (last + 1) * value.element_size() if value.numel() else 0
