"""The Inception-v3 of FID as a table, from the public state-dict file: the network of Szegedy et al. (2015, 1512.00567)
in the graph ``inception-2015-12-05``, which Heusel et al. (2017, 1706.08500) scored with.

It differs from torchvision's network of the same name in three places: average pools leave their padding out of the
mean, the last block pools by the maximum, and there are 1,008 classes.

For speed, and equal to rounding (1e-5 of the features): normalisation is folded into the convolutions; the
1 x 1 convolutions that open the branches of a block are one convolution; and the one after an average pool is done
before it, on a quarter of the channels, since both are linear and the rectifier comes last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.features.inception_layers import (
    BLOCKS,
    SPATIAL,
    SPATIAL_BLOCK,
    STEM,
    Block,
    Unit,
    entry_units,
    later_units,
    shapes,
)

Layer = Literal["64", "192", "768", "2048"]
"""Where features are read, by their number, as the FID tools name them: after the first and the second pool, before the
third reduction, and at the end; each is averaged over positions."""
EPSILON = 1e-3  # of the normalisation


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """A state dict of fixed random weights that keeps the size of activations, for tests and timings without the file.

    Its features are no Inception features: a distance in them is not FID.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes().items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("conv.weight"):
            state[name] = noise * math.sqrt(2 / math.prod(shape[1:]))
        elif name == "fc.weight":
            state[name] = noise / math.sqrt(shape[1])
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 1 + 0.1 * noise.clamp(-3, 3)
        else:
            state[name] = 0.1 * noise
    return state


@dataclass(frozen=True)
class Activations:
    """What one pass gives.

    Attributes:
        features: of the layer asked for, [B, 64 | 192 | 768 | 2048], averaged over positions.
        logits: [B, 1008] without the last layer's bias, as the Inception score of the literature reads them (Salimans'
            code, ADM's evaluator, torch-fidelity's ``logits_unbiased``); None before the last layer.
        spatial: [B, 2023] of sFID; None where the pass ended before it.
    """

    features: Tensor
    logits: Tensor | None
    spatial: Tensor | None


class Inception(nn.Module):
    """The network on images [B, 3, 299, 299] scaled to about [-1, 1].

    Args:
        state: tensors named as in ``pt_inception-2015-12-05-6726825d.pth``.
        dtype: of the convolutions; means over positions, logits and all that is given are float32.
        layout: of weights and activations in memory.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        self._dtype, self._layout = dtype, layout
        for name, shape in shapes().items():
            if name not in state or tuple(state[name].shape) != shape:
                found = f"shape {list(state[name].shape)}" if name in state else "no such tensor"
                raise ValueError(
                    f"not the Inception of FID: {name} has {found}, it must have shape {list(shape)}"
                )
        for unit in (unit for part in STEM for unit in part):
            self._keep(unit.name, *_folded(state, unit.name))
        for block in (block for part in BLOCKS for block in part):
            entries = [_folded(state, f"{block.name}.{unit.name}") for unit in entry_units(block)]
            weights, biases = zip(*entries, strict=True)
            self._keep(f"{block.name}.entry", torch.cat(weights), torch.cat(biases))
            for unit in later_units(block):
                self._keep(f"{block.name}.{unit.name}", *_folded(state, f"{block.name}.{unit.name}"))
        self.register_buffer("fc_weight", state["fc.weight"].float())
        self.eval()

    def _keep(self, name: str, weight: Tensor, bias: Tensor) -> None:
        key = name.replace(".", "_")
        self.register_buffer(f"{key}_weight", weight.to(self._dtype).contiguous(memory_format=self._layout))
        self.register_buffer(f"{key}_bias", bias.to(self._dtype))

    def _convolve(self, name: str, x: Tensor, unit: Unit | None = None) -> Tensor:
        key = name.replace(".", "_")
        stride, padding = (unit.stride, unit.padding) if unit else (1, (0, 0))
        return F.conv2d(x, self.get_buffer(f"{key}_weight"), self.get_buffer(f"{key}_bias"), stride, padding)

    @torch.no_grad()
    def forward(self, x: Tensor, layer: Layer = "2048") -> Activations:
        """One pass, ended at the layer asked for.

        Args:
            x: images [B, 3, 299, 299]; other sizes of at least 75 work, and are not FID.
            layer: see :data:`Layer`.
        """
        x = x.to(self._dtype).contiguous(memory_format=self._layout)
        for part, end in zip(STEM, ("64", "192"), strict=True):
            for unit in part:
                x = self._convolve(unit.name, x, unit).relu_()
            x = F.max_pool2d(x, 3, 2)
            if layer == end:
                return Activations(x.mean((2, 3), dtype=torch.float32), None, None)
        spatial = None
        for blocks, end in zip(BLOCKS, ("768", "2048"), strict=True):
            for block in blocks:
                x, first = self._block(block, x)
                if block.name == SPATIAL_BLOCK:
                    spatial = first[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1).float()
            if layer == end:
                break
        features = x.mean((2, 3), dtype=torch.float32)
        if layer == "768":
            return Activations(features, None, spatial)
        logits = F.linear(features, self.get_buffer("fc_weight"))
        return Activations(features, logits, spatial)

    def _block(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        """A block's output and that of its first branch."""
        units = entry_units(block)
        opened = dict(
            zip(
                (unit.name for unit in units),
                self._convolve(f"{block.name}.entry", x).split([unit.channels for unit in units], 1),
                strict=True,
            )
        )
        ends = []
        for index, branch in enumerate(block.branches):
            y = x
            for unit in branch:
                if unit.name in opened:
                    y = opened[unit.name].relu()
                else:
                    y = self._convolve(f"{block.name}.{unit.name}", y, unit).relu_()
            if index in block.forks:
                ends += [
                    self._convolve(f"{block.name}.{unit.name}", y, unit).relu_()
                    for unit in block.forks[index]
                ]
            else:
                ends.append(y)
        first = ends[0]
        if block.pool == "reduce":
            ends.append(F.max_pool2d(x, 3, 2))
        elif block.pool == "max":
            assert block.pool_unit is not None
            pooled = F.max_pool2d(x, 3, 1, 1)
            ends.append(
                self._convolve(f"{block.name}.{block.pool_unit.name}", pooled, block.pool_unit).relu_()
            )
        else:
            assert block.pool_unit is not None
            ends.append(F.avg_pool2d(opened[block.pool_unit.name], 3, 1, 1, count_include_pad=False).relu_())
        return torch.cat(ends, 1), first


def _folded(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its normalisation folded in, float32."""
    scale = state[f"{name}.bn.weight"].double() / (state[f"{name}.bn.running_var"].double() + EPSILON).sqrt()
    weight = state[f"{name}.conv.weight"].double() * scale[:, None, None, None]
    bias = state[f"{name}.bn.bias"].double() - state[f"{name}.bn.running_mean"].double() * scale
    return weight.float(), bias.float()
