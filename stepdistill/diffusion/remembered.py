"""Answers about times that are kept with them: a step asks about the same times many times over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

Function = TypeVar("Function", bound=Callable[..., Any])

_answers: Any = WeakTensorKeyDictionary()
"""By the tensor of times, for as long as somebody holds it: its version, and the answers by function and arguments."""


def remembered(function: Function) -> Function:
    """A function of times, its last argument, whose answer for a tensor is kept for as long as that very tensor lives
    and is not changed in place. Nobody may change the answer in place. One that could have a graph or a forward-mode
    derivative is not kept. The arguments before the times are hashable."""

    @wraps(function)
    def asked(*arguments: Any) -> Any:
        *others, t = arguments
        if t.requires_grad or forward_ad._current_level >= 0 or torch.is_inference_mode_enabled():
            return function(*arguments)
        version, known = _answers.get(t, (-1, {}))
        if version != t._version:
            known = {}
            _answers[t] = t._version, known
        key = (function, *others)
        if key not in known:
            known[key] = function(*arguments)
        return known[key]

    return cast(Function, asked)


def forget() -> None:
    """Drops every answer and every tensor kept here: those of fake tensors say nothing to code that follows."""
    _answers.clear()
    _at_time.cache_clear()
    _constant.cache_clear()


def at_time(time: float, like: Tensor) -> Tensor:
    """One time for all samples of ``like`` [B, ...]: [B], on its device. The tensor is kept, and with it what is
    remembered of it; nobody may change it in place."""
    return _at_time(time, len(like), like.device, torch.get_default_dtype())


@lru_cache(maxsize=64)
def _at_time(time: float, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((count,), time, device=device, dtype=dtype)


def constant(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers as a tensor on a device, to which they are copied once; nobody may change it in place."""
    return _constant(tuple(map(float, numbers)), device, torch.get_default_dtype())


@lru_cache(maxsize=64)
def _constant(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device, dtype=dtype)
