"""Images to be measured, from a folder, a zip, an npz, a webdataset tar or a Python iterator, one at a time.

An :class:`ImageSource` gives uint8 [H, W, 3] in the order of the names (numbers in a name count as numbers, so 9.png
comes before 10.png), holds a bounded number of images, and accounts for every file it met:

- used as it is: 8-bit RGB.
- converted, and counted: grayscale and 1-bit (three equal channels), palette, CMYK (PIL's conversion, no colour
  profile), an alpha channel that is opaque everywhere (dropped), and, where a resolution is asked for, every other
  size (the central square, resized with PIL's Lanczos filter). The orientation that a camera notes is not applied, as
  everywhere in the FID literature; images that are trained on (``data.images``) are turned upright.
- refused, and named: files that cannot be decoded, 16-bit and float images (there is more than one way to 8 bits),
  images with transparent pixels (what lies behind them is not stated), animations and pages, and files of other kinds.

Nothing is unpickled and only PIL's own readers of the formats below are used.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from stepdistill.errors import UserError
from stepdistill.pictures.decoding import Decoded, Entry, Size, decode

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


_DECODERS = 4


class Skipped(NamedTuple):
    """A file that was not used, and why."""

    name: str
    reason: str


Reading = Literal["anywhere", "by process", "in order"]
"""Who may read entries: any thread; one thread of any process, for archives that each process opens for itself; or the
thread that began, for compressed tars."""


@dataclass
class ImageSource:
    """Images of one source: iterate for (name, uint8 [H, W, 3]); the account is whole when the iteration has ended.

    Attributes:
        label: the path as it was given, or ``iterator``.
        kind: ``folder``, ``zip``, ``npz``, ``tar`` or ``iterator``.
        found: how many images it seems to hold; None where that is not known before the end.
        skipped: what was not used, with the reason.
        companions: endings of the other fields of webdataset samples (texts, labels), with their number.
        converted: kinds of conversion, with the number of images.
        used: images given out.
    """

    label: str
    kind: str
    found: int | None
    skipped: list[Skipped]
    _open: Callable[[], Iterator[Decoded]]
    companions: Counter[str] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)
    used: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)
    _begun: bool = False

    def __iter__(self) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        if self._begun:
            raise UserError(f"the images of {self.label} were read already: open them again")
        self._begun = True
        for name, pixels, notes in self._open():
            if pixels is None:
                self.skipped.append(Skipped(name, "; ".join(notes)))
                continue
            self.used += 1
            self.converted.update(notes)
            self._digest.update(b"%dx%d" % pixels.shape[:2])
            self._digest.update(np.ascontiguousarray(pixels).data)
            yield name, pixels

    @property
    def ahead(self) -> int:
        """How many batches another thread may make ahead: none of an iterator, which is left where it was made."""
        return 0 if self.kind == "iterator" else 2

    def batches(self, batch: int, *, ordered: bool = True) -> Iterator[Tensor]:
        """The images of :meth:`numbered` alone."""
        return (pixels for _, pixels in self.numbered(batch, ordered=ordered))

    def numbered(
        self, batch: int, *, ordered: bool = True, pinned: bool = False
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The images uint8 [B, 3, H, W], at most ``batch`` at a time and only equal sizes together, and their places in
        the order of the names, from 0.

        Args:
            batch: images at a time.
            ordered: in the order of the names; else sizes that alternate are collected, up to 4 batches in all.
            pinned: in memory that a GPU copies from while nothing waits.
        """
        held: dict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = {}
        for place, (_, pixels) in enumerate(self):
            if ordered and held and pixels.shape not in held:
                yield _stack(held.popitem()[1], pinned)
            held.setdefault(pixels.shape, []).append((place, pixels))
            if len(held[pixels.shape]) == batch:
                yield _stack(held.pop(pixels.shape), pinned)
            elif sum(map(len, held.values())) >= 4 * batch:
                yield _stack(held.pop(max(held, key=lambda shape: len(held[shape]))), pinned)
            late = next((shape for shape, rows in held.items() if place - rows[0][0] >= 4 * batch), None)
            if late is not None:
                yield _stack(held.pop(late), pinned)
        for rows in held.values():
            yield _stack(rows, pinned)

    def pixels_sha256(self) -> str:
        """Of sizes and pixels of the images given out so far: equal for a folder, a zip and an npz of one set."""
        return str(self._digest.hexdigest())

    def account(self) -> dict[str, Any]:
        """For JSON: what was found, used, converted and skipped, and the hash of the pixels."""
        return {
            "source": self.label,
            "kind": self.kind,
            "used": self.used,
            "skipped": [skipped._asdict() for skipped in self.skipped],
            "companions": dict(self.companions),
            "converted": dict(self.converted),
            "pixels_sha256": self.pixels_sha256(),
        }

    def remarks(self, most: int = 10) -> list[str]:
        """Lines that say what was converted and skipped, naming the first ``most`` skipped files."""
        lines = [f"{self.label}: {count} images: {what}" for what, count in sorted(self.converted.items())]
        if self.skipped:
            lines.append(f"{self.label}: {len(self.skipped)} files were skipped:")
            lines += [f"  {name}: {reason}" for name, reason in self.skipped[:most]]
        if len(self.skipped) > most:
            lines.append(f"  and {len(self.skipped) - most} more")
        return lines


def _stack(rows: list[tuple[int, NDArray[np.uint8]]], pinned: bool) -> tuple[list[int], Tensor]:
    import torch

    pixels = torch.empty((len(rows), *rows[0][1].shape), dtype=torch.uint8, pin_memory=pinned)
    np.stack([each for _, each in rows], out=pixels.numpy())
    return [place for place, _ in rows], pixels.permute(0, 3, 1, 2)


def decode_all(
    entries: Sequence[Entry],
    resolution: Size,
    reading: Reading,
    *,
    upright: bool = False,
    workers: int | None = 0,
) -> Iterator[Decoded]:
    """The images of entries in order, a bounded number ahead.

    Args:
        entries: what to decode.
        resolution: see :func:`stepdistill.pictures.decoding.fit`.
        reading: who may read them.
        upright: turn them as their EXIF says.
        workers: processes that decode; 0 is threads, None what fits their number and the machine. What is read in order
            is decoded by threads.
    """
    if workers is None or workers:
        from stepdistill.data.image_workers import decode_in_processes, usual_workers

        workers = usual_workers(len(entries)) if workers is None else workers
        if workers and reading != "in order":
            yield from decode_in_processes(entries, resolution, workers, upright=upright)
            return
    with ThreadPoolExecutor(_DECODERS) as pool:
        ahead: deque[Any] = deque()
        for entry in entries:
            try:
                read = entry.read if reading == "anywhere" else partial(bytes, entry.read())
            except Exception as error:  # a damaged member of an archive that can be read otherwise
                read = _raiser(error)
            ahead.append(pool.submit(decode, entry.name, read, resolution, upright=upright))
            if len(ahead) >= 4 * _DECODERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _raiser(error: Exception) -> Callable[[], bytes]:
    def read() -> bytes:
        raise error

    return read
