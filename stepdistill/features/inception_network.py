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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Literal["64", "192", "768", "2048"]
"""Where features are read, by their number, as the FID tools name them: after the first and the second pool, before the
third reduction, and at the end; each is averaged over positions."""

CLASSES = 1008
EPSILON = 1e-3  # of the normalisation
SPATIAL = 7
"""sFID reads the first 7 channels of one convolution at its 17 x 17 positions: 2,023 numbers."""


@dataclass(frozen=True)
class Unit:
    """A convolution without bias, normalisation, rectifier. ``padding`` None keeps the size."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padded: bool = True

    @property
    def padding(self) -> tuple[int, int]:
        return (self.kernel[0] // 2, self.kernel[1] // 2) if self.padded else (0, 0)


@dataclass(frozen=True)
class Block:
    """Branches side by side, joined along channels.

    Attributes:
        name: as the weights are named.
        branches: chains of units.
        forks: for a branch's index, two more units that both read its end and are joined.
        pool: how the last branch pools: ``average`` or ``max`` at stride 1, then ``pool_unit``; ``reduce`` is the
            maximum at stride 2 without a unit.
    """

    name: str
    branches: tuple[tuple[Unit, ...], ...]
    pool: Literal["average", "max", "reduce"]
    pool_unit: Unit | None = None
    forks: Mapping[int, tuple[Unit, Unit]] = field(default_factory=dict)


def _unit(name: str, channels: int, height: int = 1, width: int | None = None) -> Unit:
    return Unit(name, channels, (height, width or height))


def _reduction(name: str, channels: int) -> Unit:
    return Unit(name, channels, (3, 3), stride=2, padded=False)


def _mixed_5(name: str, pooled: int) -> Block:
    five = (_unit("branch5x5_1", 48), _unit("branch5x5_2", 64, 5))
    three = (
        _unit("branch3x3dbl_1", 64),
        _unit("branch3x3dbl_2", 96, 3),
        _unit("branch3x3dbl_3", 96, 3),
    )
    return Block(
        name, ((_unit("branch1x1", 64),), five, three), "average", pool_unit=_unit("branch_pool", pooled)
    )


def _mixed_6(name: str, inner: int) -> Block:
    seven = (
        _unit("branch7x7_1", inner),
        _unit("branch7x7_2", inner, 1, 7),
        _unit("branch7x7_3", 192, 7, 1),
    )
    double = (
        _unit("branch7x7dbl_1", inner),
        _unit("branch7x7dbl_2", inner, 7, 1),
        _unit("branch7x7dbl_3", inner, 1, 7),
        _unit("branch7x7dbl_4", inner, 7, 1),
        _unit("branch7x7dbl_5", 192, 1, 7),
    )
    return Block(
        name, ((_unit("branch1x1", 192),), seven, double), "average", pool_unit=_unit("branch_pool", 192)
    )


def _mixed_7(name: str, pool: Literal["average", "max"]) -> Block:
    double = (_unit("branch3x3dbl_1", 448), _unit("branch3x3dbl_2", 384, 3))
    forks = {
        1: (_unit("branch3x3_2a", 384, 1, 3), _unit("branch3x3_2b", 384, 3, 1)),
        2: (_unit("branch3x3dbl_3a", 384, 1, 3), _unit("branch3x3dbl_3b", 384, 3, 1)),
    }
    branches = ((_unit("branch1x1", 320),), (_unit("branch3x3_1", 384),), double)
    return Block(name, branches, pool, pool_unit=_unit("branch_pool", 192), forks=forks)


_MIXED_6A = Block(
    "Mixed_6a",
    (
        (_reduction("branch3x3", 384),),
        (_unit("branch3x3dbl_1", 64), _unit("branch3x3dbl_2", 96, 3), _reduction("branch3x3dbl_3", 96)),
    ),
    "reduce",
)
_MIXED_7A = Block(
    "Mixed_7a",
    (
        (_unit("branch3x3_1", 192), _reduction("branch3x3_2", 320)),
        (
            _unit("branch7x7x3_1", 192),
            _unit("branch7x7x3_2", 192, 1, 7),
            _unit("branch7x7x3_3", 192, 7, 1),
            _reduction("branch7x7x3_4", 192),
        ),
    ),
    "reduce",
)

STEM = (
    (
        Unit("Conv2d_1a_3x3", 32, (3, 3), stride=2, padded=False),
        Unit("Conv2d_2a_3x3", 32, (3, 3), padded=False),
        Unit("Conv2d_2b_3x3", 64, (3, 3)),
    ),
    (Unit("Conv2d_3b_1x1", 80, (1, 1)), Unit("Conv2d_4a_3x3", 192, (3, 3), padded=False)),
)
"""Each part ends in a maximum pool at stride 2."""

BLOCKS = (
    (
        _mixed_5("Mixed_5b", 32),
        _mixed_5("Mixed_5c", 64),
        _mixed_5("Mixed_5d", 64),
        _MIXED_6A,
        _mixed_6("Mixed_6b", 128),
        _mixed_6("Mixed_6c", 160),
        _mixed_6("Mixed_6d", 160),
        _mixed_6("Mixed_6e", 192),
    ),
    (_MIXED_7A, _mixed_7("Mixed_7b", "average"), _mixed_7("Mixed_7c", "max")),
)
"""Before and after the 768 features."""

SPATIAL_BLOCK = "Mixed_6d"
"""Its first branch is the graph's ``mixed_6/conv``, which sFID reads (Nash et al. 2021, 2103.03841, as ADM's evaluator
has it)."""


def shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that is read of the state-dict file (``num_batches_tracked`` is not)."""
    found: dict[str, tuple[int, ...]] = {}

    def put(name: str, incoming: int, unit: Unit) -> int:
        found[f"{name}.conv.weight"] = (unit.channels, incoming, *unit.kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.bn.{part}"] = (unit.channels,)
        return unit.channels

    channels = 3
    for unit in (unit for part in STEM for unit in part):
        channels = put(unit.name, channels, unit)
    for block in (block for part in BLOCKS for block in part):
        total = 0
        for index, branch in enumerate(block.branches):
            wide = channels
            for unit in branch:
                wide = put(f"{block.name}.{unit.name}", wide, unit)
            ends = [put(f"{block.name}.{unit.name}", wide, unit) for unit in block.forks.get(index, ())]
            total += sum(ends) or wide
        if block.pool_unit is None:
            total += channels
        else:
            total += put(f"{block.name}.{block.pool_unit.name}", channels, block.pool_unit)
        channels = total
    return {**found, "fc.weight": (CLASSES, channels), "fc.bias": (CLASSES,)}


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
        logits: [B, 1008] with bias; None before the last layer.
        spatial: [B, 2023] of sFID; None where the pass ended before it.
    """

    features: Tensor
    logits: Tensor | None
    spatial: Tensor | None


class Inception(nn.Module):
    """The network on images [B, 3, 299, 299] scaled to about [-1, 1].

    Args:
        state: tensors named as in ``pt_inception-2015-12-05-6726825d.pth``.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, shape in shapes().items():
            if name not in state or tuple(state[name].shape) != shape:
                found = f"shape {list(state[name].shape)}" if name in state else "no such tensor"
                raise ValueError(
                    f"not the Inception of FID: {name} has {found}, it must have shape {list(shape)}"
                )
        for unit in (unit for part in STEM for unit in part):
            self._keep(unit.name, *_folded(state, unit.name))
        for block in (block for part in BLOCKS for block in part):
            entries = [_folded(state, f"{block.name}.{unit.name}") for unit in _entries(block)]
            weights, biases = zip(*entries, strict=True)
            self._keep(f"{block.name}.entry", torch.cat(weights), torch.cat(biases))
            for unit in _later(block):
                self._keep(f"{block.name}.{unit.name}", *_folded(state, f"{block.name}.{unit.name}"))
        self.register_buffer("fc_weight", state["fc.weight"].float())
        self.register_buffer("fc_bias", state["fc.bias"].float())
        self.eval()

    def _keep(self, name: str, weight: Tensor, bias: Tensor) -> None:
        key = name.replace(".", "_")
        self.register_buffer(f"{key}_weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer(f"{key}_bias", bias)

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
        x = x.contiguous(memory_format=torch.channels_last)
        for part, end in zip(STEM, ("64", "192"), strict=True):
            for unit in part:
                x = self._convolve(unit.name, x, unit).relu_()
            x = F.max_pool2d(x, 3, 2)
            if layer == end:
                return Activations(x.mean((2, 3)), None, None)
        spatial = None
        for blocks, end in zip(BLOCKS, ("768", "2048"), strict=True):
            for block in blocks:
                x, first = self._block(block, x)
                if block.name == SPATIAL_BLOCK:
                    spatial = first[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
            if layer == end:
                break
        features = x.mean((2, 3))
        if layer == "768":
            return Activations(features, None, spatial)
        logits = F.linear(features, self.get_buffer("fc_weight"), self.get_buffer("fc_bias"))
        return Activations(features, logits, spatial)

    def _block(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        """A block's output and that of its first branch."""
        units = _entries(block)
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


def _entries(block: Block) -> list[Unit]:
    """The 1 x 1 units that read the block's input, in the order of the branches."""
    firsts = [branch[0] for branch in block.branches if branch[0].kernel == (1, 1)]
    return firsts + ([block.pool_unit] if block.pool_unit and block.pool == "average" else [])


def _later(block: Block) -> Iterator[Unit]:
    """All other units of the block."""
    entries = {unit.name for unit in _entries(block)}
    for index, branch in enumerate(block.branches):
        yield from (unit for unit in (*branch, *block.forks.get(index, ())) if unit.name not in entries)
    if block.pool_unit and block.pool_unit.name not in entries:
        yield block.pool_unit


def _folded(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its normalisation folded in, float32."""
    scale = state[f"{name}.bn.weight"].double() / (state[f"{name}.bn.running_var"].double() + EPSILON).sqrt()
    weight = state[f"{name}.conv.weight"].double() * scale[:, None, None, None]
    bias = state[f"{name}.bn.bias"].double() - state[f"{name}.bn.running_mean"].double() * scale
    return weight.float(), bias.float()
