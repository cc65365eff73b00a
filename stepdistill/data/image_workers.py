"""Image files decoded in processes, by torch's DataLoader: chunks of files go out, their pixels come back in order, in
shared memory."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stepdistill.errors import UserError
from stepdistill.pictures.decoding import Decoded, Entry, Size, decode, most_pixels

FEW = 1000
"""Fewer images are decoded by threads: processes would hardly have started."""
MOST = 16
CHUNK, CHUNK_BYTES = 16, 1 << 22
"""Images of a chunk at most, and pixels of it, where their size is known."""
WAITING = 2
"""Chunks ready or in making for each process."""
SHARED_MEMORY = "/dev/shm"


def usual_workers(count: int) -> int:
    """How many processes decode so many images where nobody says it: all cores but two, at most 16, and no more than
    shared memory has room for; each process of a launch has its share of both. 0, which leaves it to threads, for few
    images, on up to 5 cores (decoding lets go of the interpreter, so that four threads fill them), and where processes
    cannot be forked, as a spawned one would run the caller's script again."""
    if sys.platform != "linux" or count < FEW:
        return 0
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) // launched
    room = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    most = room // launched // (2 * (WAITING + 1) * CHUNK_BYTES)
    return 0 if cores < 6 else min(cores - 2, MOST, most)


class _Pixels(NamedTuple):
    """A chunk: for every file its name, the height and width or None, and notes; all pixels one after the other."""

    files: list[tuple[str, tuple[int, int] | None, tuple[str, ...]]]
    flat: Tensor


class _Decoder(Dataset[_Pixels]):
    """Item k is the k-th chunk of entries."""

    def __init__(self, entries: Sequence[Entry], resolution: Size, upright: bool) -> None:
        self._entries, self._resolution, self._upright = entries, resolution, upright
        pixels = most_pixels(resolution)
        self._each = min(CHUNK, max(1, CHUNK_BYTES // (3 * pixels))) if pixels else CHUNK // 4

    def __len__(self) -> int:
        return -(-len(self._entries) // self._each)

    def __getitem__(self, index: int) -> _Pixels:
        some = self._entries[index * self._each : (index + 1) * self._each]
        found = [decode(one.name, one.read, self._resolution, upright=self._upright) for one in some]
        files = [(name, None if pixels is None else pixels.shape[:2], notes) for name, pixels, notes in found]
        every = [pixels.reshape(-1) for _, pixels, _ in found if pixels is not None]
        return _Pixels(files, torch.from_numpy(np.concatenate(every or [np.empty(0, np.uint8)])))


def decode_in_processes(
    entries: Sequence[Entry], resolution: Size, workers: int, *, upright: bool = False
) -> Iterator[Decoded]:
    """The images of entries in order, as :func:`stepdistill.pictures.decoding.decode` gives them.

    Args:
        entries: what to decode; each process reads its own.
        resolution: see :func:`stepdistill.pictures.decoding.fit`.
        workers: processes, at least 1.
        upright: turn images as their EXIF says.

    Raises:
        UserError: a process was ended, as by a system that is out of memory, or cannot read a file now.
    """
    decoder = _Decoder(entries, resolution, upright)
    loader = DataLoader(
        decoder,
        batch_size=None,
        num_workers=min(workers, len(decoder)),
        prefetch_factor=WAITING,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # its own, as a loader draws a seed for its processes
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    try:
        for chunk in loader:
            yield from _unpacked(chunk)
    except UserError as error:  # a loader adds its process's traceback, which ends with the message
        raise UserError(str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that decodes images ended ({str(error).splitlines()[0]}): give --workers 0, or fewer, if "
            "memory is short"
        ) from None


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _unpacked(chunk: _Pixels) -> Iterator[Decoded]:
    flat, start = chunk.flat.numpy(), 0
    for name, size, notes in chunk.files:
        if size is None:
            yield Decoded(name, None, notes)
            continue
        stop = start + 3 * size[0] * size[1]
        yield Decoded(name, flat[start:stop].reshape(*size, 3), notes)
        start = stop
