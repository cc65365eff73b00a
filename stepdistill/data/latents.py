"""Latents of images or videos, each encoded once: a few are kept in memory, all others in shards on the disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepdistill.data.image_sources import Skipped
from stepdistill.data.row_cache import CHUNK, MEMORY_BYTES, MEMORY_ROWS, SHARD
from stepdistill.data.shards import Shards, Tensors, grouped
from stepdistill.data.sizes import Wanted, latents_size
from stepdistill.data.training_images import Images
from stepdistill.errors import UserError
from stepdistill.families.size import Size
from stepdistill.pictures.decoding import Nearest
from stepdistill.system.log import bar
from stepdistill.system.parsing import parse_json
from stepdistill.system.processes import ALONE, Processes

CHUNK_PIXELS = 2**22
"""Pixels that are encoded together at most, where that is more than one image."""

_IMAGE = " image"
_Made = tuple[int, Tensors, dict[str, str]]


class Latents:
    """Latents of images, by their sizes; :meth:`make` makes those that are missing.

    Args:
        images: what is encoded; not all may turn out to be usable.
        encode: pixels [B, 3, H, W], or of videos [B, F, 3, H, W], in [-1, 1] -> their latents.
        state: the shape of one, without B, at the first of the sizes, which all have about the same area.
        sizes: what images are cropped and resized to, each to that of the nearest aspect ratio.
        place: the folder of the shards, asked for only where latents do not stay in memory; its name says all that they
            depend on. Shards that are there already are kept, so an interrupted run goes on.
        remake: whether damaged shards are made again.

    Attributes:
        on_disk: whether they are read from the disk when they are taken.
        counts: how many images each size has, once they are made.
        converted: kinds of conversion, with the number of images.
        skipped: what is not used, with the reason.
    """

    def __init__(
        self,
        images: Images,
        encode: Callable[[Tensor], Tensor],
        state: tuple[int, ...],
        sizes: Sequence[Size],
        place: Callable[[], Path],
        remake: bool = False,
    ) -> None:
        self._images, self._encode, self.sizes = images, encode, list(sizes)
        self._count = len(images.captions)
        self._size, self._numbers = latents_size(self._count, state), range(-(-self._count // SHARD))
        self.on_disk = self._count > MEMORY_ROWS or self._size.bytes > MEMORY_BYTES
        self._kept: dict[int, Tensors] = {}
        self.counts: list[int] = []
        self.converted, self.skipped = Counter[str](), list[Skipped]()
        if self.on_disk:
            self._shards = Shards(place(), "latents", remake)

    def wanted(self) -> Wanted | None:
        """What is to be written; None where latents stay in memory."""
        if not self.on_disk:
            return None
        there = min(self._count, SHARD * self._shards.there(self._numbers))
        return Wanted(self._size, self._shards.folder, there)

    def make(self, processes: Processes = ALONE) -> Latents:
        """Decodes and encodes what is missing.

        Args:
            processes: who share the work; each is to do this.

        Raises:
            UserError: a shard on the disk is damaged, or no image is usable.
        """
        notes: list[dict[str, str]] = []
        numbers = self._numbers
        if self.on_disk:
            processes.together(lambda: self._to_disk(processes))
            notes = [self._shards.notes(number) for number in numbers]
        else:
            for number, tensors, noted in self._made(list(numbers), processes.main):
                self._kept[number] = tensors
                notes.append(noted)
        found = [self._shards.shapes(number) if self.on_disk else self._shapes(number) for number in numbers]
        self._ends = [
            np.fromiter(accumulate(each.get(_name(size), (0,))[0] for each in found), np.int64)
            for size in self.sizes
        ]
        self.counts = [int(ends[-1]) for ends in self._ends]
        self.converted = sum((Counter(parse_json(note["converted"])) for note in notes), Counter[str]())
        self.skipped = [Skipped(*each) for note in notes for each in parse_json(note["skipped"])]
        if not sum(self.counts):
            first = f": {self.skipped[0].name} {self.skipped[0].reason}" if self.skipped else ""
            raise UserError(f"data.images holds no usable image ({len(self.skipped)} skipped{first})")
        return self

    def take(self, size: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of the images of one of the sizes those of ``index`` [B]: their latents [B, ...], and their numbers [B] among
        all images."""
        name, ends, rows = _name(self.sizes[size]), self._ends[size], index.numpy()
        shard = np.searchsorted(ends, rows, "right")
        row = rows - np.where(shard > 0, ends[shard - 1], 0)
        found = dict[int, tuple[Tensor, Tensor]]()
        for number, places in grouped(shard.tolist()).items():
            own = [self._rows(number, each, row[places].tolist()) for each in (name, name + _IMAGE)]
            found.update(zip(places, zip(*own, strict=True), strict=True))
        every = [found[place] for place in range(len(rows))]
        return torch.stack([x for x, _ in every]), torch.stack([number for _, number in every])

    def remarks(self, most: int = 5) -> list[str]:
        """Lines that say what was converted and what was skipped, naming the first."""
        lines = [
            f"data.images: {count} {self._images.noun}s: {what}"
            for what, count in sorted(self.converted.items())
        ]
        if self.skipped:
            names = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:most])
            more = "; ..." if len(self.skipped) > most else ""
            lines.append(f"data.images: {len(self.skipped)} files skipped: {names}{more}")
        return lines

    def _rows(self, number: int, name: str, rows: list[int]) -> Tensor:
        return self._shards.rows(number, name, rows) if self.on_disk else self._kept[number][name][rows]

    def _shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._kept[number].items()}

    def _to_disk(self, processes: Processes) -> None:
        missing = self._shards.missing(self._numbers, processes)
        for number, tensors, notes in self._made(missing, processes.main) if missing else ():
            self._shards.write(number, tensors, notes)

    def _made(self, numbers: list[int], shown: bool) -> Iterator[_Made]:
        """Those shards, from one stream of decoded images."""
        own = [range(number * SHARD, min((number + 1) * SHARD, self._count)) for number in numbers]
        nearest = Nearest(tuple((size.height, size.width) for size in self.sizes))
        stream = self._images.decoded([i for rows in own for i in rows], nearest)
        progress = bar(sum(map(len, own)), "latents", unit=self._images.noun, shown=shown, lazy=True)
        for number, rows in zip(numbers, own, strict=True):
            parts: dict[str, list[Tensor]] = {}
            waiting: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
            skipped, converted = [], Counter[str]()
            for i in rows:
                name, pixels, notes = next(stream)
                progress.update(1)
                if pixels is None:
                    skipped.append((name, "; ".join(notes)))
                    continue
                converted.update(notes)
                side = pixels.shape[-3], pixels.shape[-2]
                held = waiting.setdefault(side, [])
                held.append((i, torch.tensor(pixels)))
                if len(held) == max(1, min(CHUNK, 3 * CHUNK_PIXELS // pixels.size)):
                    self._add(parts, waiting.pop(side))
            for held in waiting.values():
                self._add(parts, held)
            told = {"skipped": json.dumps(skipped), "converted": json.dumps(converted)}
            yield number, {name: torch.cat(some) for name, some in parts.items()}, told
        progress.close()

    def _add(self, parts: dict[str, list[Tensor]], held: list[tuple[int, Tensor]]) -> None:
        pixels = torch.stack([each.movedim(-1, -3) for _, each in held]).float() / 127.5 - 1
        name = _name(Size(*pixels.shape[-2:]))
        parts.setdefault(name, []).append(self._encode(pixels).cpu())
        parts.setdefault(name + _IMAGE, []).append(torch.tensor([i for i, _ in held]))


def _name(size: Size) -> str:
    return f"{size.height}x{size.width}"
