"""Reads the pickled reference statistics of EDM2 without running anything that the file says.

A pickle is a program: what it names is imported and called. Here every name it may use stands for a class or function
of this file that only keeps what it is given, and any other name is refused before it is looked up. Arrays are then
built from their bytes, so not even numpy's own reader runs.
"""

from __future__ import annotations

import pickle
import pickletools
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from stepdistill.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray


MOST_VALUES = 100_000
_NUMBERS = frozenset("f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8".split())


class _Type:
    """Stands for numpy.dtype."""

    def __init__(self, code: str, *rest: object) -> None:
        if code not in _NUMBERS:
            raise pickle.UnpicklingError(f"an array of {str(code)[:40]!r}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    """Stands for numpy.ndarray and for numpy's functions that make one."""

    def __init__(self, *given: Any) -> None:
        self.array: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.array = _array(data, kind, shape, "F" if fortran else "C")


def _from_buffer(data: bytes, kind: _Type, shape: tuple[int, ...], order: str = "C", *rest: object) -> _Array:
    made = _Array()
    made.array = _array(data, kind, shape, order)
    return made


def _scalar(kind: _Type, data: bytes) -> float:
    return float(_array(data, kind, (), "C"))


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {str(encoding)[:40]!r}")
    return text.encode("latin1")


def _array(data: Any, kind: Any, shape: Any, order: str) -> NDArray[Any]:
    if (
        not isinstance(kind, _Type)
        or not isinstance(data, (bytes, bytearray))
        or not isinstance(shape, tuple)
    ):
        raise pickle.UnpicklingError("an array that is none")
    flat = np.frombuffer(bytes(data), np.dtype(kind.order + kind.code))
    return flat.reshape(shape, order="F" if order == "F" else "C")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it calls {module}.{name}") from None


def read_pickled_statistics(file: Path) -> dict[str, Any]:
    """The dictionary that a file holds: numbers, texts, arrays of numbers, and dictionaries and lists of these.

    Raises:
        UserError: the file holds something else, asks for anything to be called, or is damaged.
    """
    try:
        with file.open("rb") as stream:
            _check_memo(stream)
            content = _plain(_Reader(stream).load(), [MOST_VALUES])
    except Exception as error:  # a made-up pickle can raise anything; nothing of it was run
        raise UserError(
            f"{file} is refused ({' '.join(str(error).split())[:200]}): a pickle of statistics holds only "
            "dictionaries, numbers and arrays; nothing of it was run"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{file} holds a {type(content).__name__}; statistics are a dictionary with mu and sigma"
        )
    return content


def _check_memo(stream: BinaryIO) -> None:
    """Python's reader makes room up to the largest number in its memo, which a file of ten bytes may claim."""
    for place, (code, number, _) in enumerate(pickletools.genops(stream)):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(number, int) and number > place:
            raise pickle.UnpicklingError(f"a memo of {number} entries")
    stream.seek(0)


def _plain(value: Any, left: list[int]) -> Any:
    """The same without the classes of this file; ``left`` is how many values it may still be: lists of one list many
    times, some levels deep, are more than memory has."""
    left[0] -= 1
    if left[0] < 0:
        raise pickle.UnpicklingError(f"it stands for more than {MOST_VALUES} values")
    if isinstance(value, _Array):
        if value.array is None:
            raise pickle.UnpicklingError("an array without content")
        return value.array
    if isinstance(value, dict):
        return {str(key): _plain(inner, left) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, left) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
