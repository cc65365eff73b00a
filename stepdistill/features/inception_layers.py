"""The layers of Inception-v3 as a table: what each is called, how wide it is, and what it takes from the one before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

CLASSES = 1008
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


def entry_units(block: Block) -> list[Unit]:
    """The 1 x 1 units that read the block's input, in the order of the branches."""
    firsts = [branch[0] for branch in block.branches if branch[0].kernel == (1, 1)]
    return firsts + ([block.pool_unit] if block.pool_unit and block.pool == "average" else [])


def later_units(block: Block) -> Iterator[Unit]:
    """All other units of the block."""
    entries = {unit.name for unit in entry_units(block)}
    for index, branch in enumerate(block.branches):
        yield from (unit for unit in (*branch, *block.forks.get(index, ())) if unit.name not in entries)
    if block.pool_unit and block.pool_unit.name not in entries:
        yield block.pool_unit
