"""Rows of named tensors, each computed once: kept in memory where all fit, in shards on the disk where they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from stepdistill.errors import UserError
from stepdistill.families.condition import Condition, joined
from stepdistill.system.files import written_whole
from stepdistill.system.log import bar
from stepdistill.system.processes import launched

CACHE_BYTES = 2**31
"""Rows stay in memory while they are smaller than this in all."""

SHARD = 256
"""Rows in one file."""

CHUNK = 64
"""Rows that are computed together."""

Tensors = Mapping[str, Tensor]


class RowCache:
    """Rows of named tensors.

    Args:
        count: number of rows.
        compute: indices -> tensors with those rows; of sequences, padded where a mask says so, see ``joined``.
        place: the folder of the shards, asked for only where rows do not fit in memory; its name says all that they
            depend on. Shards that are there already are kept, so an interrupted run goes on.
        what: what they are, for the progress bar.

    Raises:
        UserError: a shard on the disk is damaged.
    """

    def __init__(
        self,
        count: int,
        compute: Callable[[list[int]], Tensors],
        place: Callable[[], Path],
        what: str = "rows",
    ) -> None:
        self.count, self._compute = count, compute
        first = compute([0])
        size = sum(value.numel() * value.element_size() for value in first.values()) * count
        self._kept: Tensors | None = None
        self._folder: Path | None = None
        if size <= CACHE_BYTES:
            self._kept = self._computed(range(count))
            return
        self._folder = place()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open: dict[int, safe_open] = {}
        self._names: tuple[str, ...] = ()
        self._lengths: dict[str, int] = {}
        shards = range(-(-count // SHARD))
        label, main = f"{what}, {size / 2**30:.1f} GiB to {self._folder}", launched().main
        shown = bar(len(shards), label, unit="file", shown=main, lazy=True)
        for number in shards:
            self._make(number)
            shown.update(1)
        shown.close()

    @property
    def on_disk(self) -> bool:
        """Whether rows are read from the disk when they are taken."""
        return self._kept is None

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The rows [B, ...] of ``index`` [B], sequences as long as the longest of all rows."""
        if self._kept is not None:
            return {name: value[index] for name, value in self._kept.items()}
        rows = [self._read(*divmod(int(i), SHARD)) for i in index]
        found = joined([Condition(row) for row in rows]).tensors if rows else {}
        return {name: self._padded(name, value) for name, value in found.items()}

    def _computed(self, rows: Sequence[int]) -> Tensors:
        parts = [self._compute(list(rows[i : i + CHUNK])) for i in range(0, len(rows), CHUNK)]
        return joined([Condition({name: v.cpu() for name, v in part.items()}) for part in parts]).tensors

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"rows-{number:05d}.safetensors"

    def _make(self, number: int) -> None:
        file = self._file(number)
        if not file.is_file():
            made = self._computed(range(number * SHARD, min((number + 1) * SHARD, self.count)))
            with written_whole(file) as temporary:
                save_file({name: value.contiguous() for name, value in made.items()}, temporary)
        try:
            shard = safe_open(file, "pt")
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}): delete it, and it is made again") from error
        self._open[number], self._names = shard, tuple(shard.keys())
        for name in self._names:
            shape = shard.get_slice(name).get_shape()
            if len(shape) > 1:
                self._lengths[name] = max(shape[1], self._lengths.get(name, 0))

    def _read(self, number: int, row: int) -> Tensors:
        shard = self._open[number]
        return {name: shard.get_slice(name)[row : row + 1] for name in self._names}

    def _padded(self, name: str, value: Tensor) -> Tensor:
        missing = self._lengths[name] - value.shape[1] if value.ndim > 1 else 0
        return F.pad(value, (0, 0) * (value.ndim - 2) + (0, missing)) if missing else value
