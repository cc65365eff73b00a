"""A frozen network whose adapted linear layers are held in eight bits or four (Dettmers et al. 2023, 2305.14314).

Quantised are the linear layers that carry adapters, which are nearly all weights of a transformer; what is around them
stays as it is. ``int8``: a scale for each row, from torchao. ``nf4``: the 16 quantiles of a normal distribution over
blocks of 64 weights, whose scales are in eight bits themselves, from bitsandbytes. A product is one of weights that are
widened for it.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stepdistill.errors import UserError

Bits = Literal["int8", "nf4"]

LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_quantized(bits: Bits, device: torch.device) -> None:
    """Whether a network can be held so on a device.

    Raises:
        UserError: it cannot, with what is missing.
    """
    library = LIBRARIES[bits]
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f"student.base is {bits}, which needs {library}, and that is not installed: pip install "
            f'"stepdistill[quantized]", or set student.base=auto'
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"student.base is {bits}, which runs on cpu and cuda, and this run is on {device.type}: set "
            "student.base=auto"
        )


def quantized(net: nn.Module, bits: Bits, targets: Sequence[str]) -> nn.Module:
    """A network with the same tensors but for its linear layers among ``targets`` (suffixes of names), quantised.

    Raises:
        UserError: there is none.
    """
    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    made = copy.deepcopy(net, dict(shared))
    found = {
        name: layer
        for name, layer in made.named_modules()
        if isinstance(layer, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets)
    }
    if not found:
        raise UserError(
            f"student.base is {bits}, but a {type(net).__name__} has no linear layers that carry adapters: set "
            "student.base=auto"
        )
    for name, layer in found.items():
        made.set_submodule(name, _int8(layer) if bits == "int8" else _nf4(layer))
    return made.requires_grad_(False)


def _int8(layer: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig())  # gives the layer another weight; the one it had stays as it was
    return layer


def _nf4(layer: nn.Linear) -> nn.Module:
    import bitsandbytes

    weight, bias = layer.weight, layer.bias
    made: Any = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias is not None, compute_dtype=weight.dtype, quant_type="nf4"
    )
    made.weight = bitsandbytes.nn.Params4bit(
        weight.detach().clone(), requires_grad=False, quant_type="nf4", module=made
    )
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    # Without a graph it would lay its weights out anew on some processors, and calls with one need them as they are.
    made.support_avx512bf16_for_cpu = False
    placed: nn.Module = made.to(weight.device)  # quantises
    return placed


def plain_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state in which what a quantised tensor is made of stands in its place."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if is_traceable_wrapper_subclass(value):
            parts = {part: getattr(value, part) for part in value.__tensor_flatten__()[0]}
            found |= {f"{name}.{part}": each for part, each in parts.items()}
        else:
            found[name] = value
    return found
