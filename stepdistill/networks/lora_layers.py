"""peft's layers with adapters, called in as few operators as there can be: a network of many small adapted layers is
bound by how fast a GPU is told what to do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as peft
from torch import Tensor


class _Lean(torch.nn.Module):
    """A forward of W x + scale B A x for the one adapter that is on, or of W x for none. Two products and a sum beyond
    the layer's own; under autocast the input is cast once for W and A, and never to the adapter's float32 and back.
    peft's own forward has two casts and a product more, and for each call a dozen look-ups."""

    base_layer: Any
    lora_A: Any
    lora_B: Any
    scaling: dict[str, float]
    _active_adapter: list[str]
    _disable_adapters: bool

    def _product(self, of: Any, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        said: Tensor = self.base_layer(x)
        if self._disable_adapters:
            return said
        name = self._active_adapter[0]
        change = self._product(self.lora_B[name], self._product(self.lora_A[name], x))
        return torch.add(said, change, alpha=self.scaling[name])


class LeanLinear(_Lean, peft.Linear):  # type: ignore[misc]  # the forward is narrower than peft's
    """A linear layer with adapters."""

    def _product(self, of: Any, x: Tensor) -> Tensor:
        return F.linear(x, of.weight)


class LeanConv2d(_Lean, peft.Conv2d):  # type: ignore[misc]
    """A convolution with adapters."""

    def _product(self, of: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, of.weight, None, of.stride, of.padding, of.dilation, of.groups)


def make_lean(layer: Any) -> None:
    """Gives a layer that peft made the forward of this file, where it is of a kind that has one: on a linear layer,
    whatever its weights are held in, or a convolution."""
    if isinstance(layer, peft.Linear) and isinstance(layer.get_base_layer(), torch.nn.Linear):
        layer.__class__ = LeanLinear
    elif type(layer) is peft.Conv2d:
        layer.__class__ = LeanConv2d
