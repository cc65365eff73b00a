"""Layers that take the memory of quantised ones, without their libraries, their numbers or a GPU.

A weight of ``int8`` is a byte, with a scale for each row; one of ``nf4`` half a byte, with a byte for every 64 and a
float32 number for every 256 of those. Both are widened for each product, in the backward pass once more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.networks.quantized import Bits
from stepdistill.training import roles

BLOCK, NESTED = 64, 256
"""Weights under one scale, and scales under one of theirs."""


class PackedLinear(nn.Linear):
    """A linear layer whose weight is a byte or half of one.

    Args:
        layer: the plain one.
        bits: how it is held.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear, bits: Bits) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        weight, self.bias = layer.weight, layer.bias
        # Says shape and type, and holds one number.
        self.weight = nn.Parameter(weight.new_empty(1).expand(weight.shape), requires_grad=False)
        count = weight.numel()
        if bits == "int8":
            packed, scales = (
                weight.new_empty(weight.shape, dtype=torch.int8),
                weight.new_empty(self.out_features),
            )
        else:
            packed = weight.new_empty(-(-count // 2), dtype=torch.uint8)
            scales = weight.new_empty(-(-count // BLOCK), dtype=torch.uint8)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        nested = -(-scales.numel() // NESTED) + 2 * NESTED if bits == "nf4" else 0  # and two tables of codes
        self.register_buffer("nested", weight.new_empty(nested, dtype=torch.float32), persistent=False)

    def wide(self) -> Tensor:
        """The weight as a product takes it, with what is made on the way."""
        if self.bits == "int8":
            wide: Tensor = self.packed.to(self.weight.dtype) * self.scales[:, None]
            return wide
        self.scales.float()
        return self.packed.new_empty(self.weight.shape, dtype=self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        said: Tensor = _Product.apply(input, self)
        return said


class _Product(torch.autograd.Function):
    """A product with a weight that is widened for it and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x.to(layer.weight.dtype), layer.wide(), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.wide(), None


@contextmanager
def quantised_in_plan() -> Iterator[None]:
    """Within it ``student.base`` makes such layers, whatever is installed."""

    def quantised(net: nn.Module, bits: Bits, targets: Sequence[str]) -> nn.Module:
        made = copy.deepcopy(net, {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())})
        for name, layer in list(made.named_modules()):
            if isinstance(layer, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets):
                made.set_submodule(name, PackedLinear(layer, bits))
        return made.requires_grad_(False)

    with patch.object(roles, "quantized", quantised), patch.object(roles, "check_quantized", lambda *_: None):
        yield
