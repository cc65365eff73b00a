"""Rows of many images on disk, a file for each fixed range of indices: memory is flat, a kill loses no more than the
files that were being made, and every process writes files of its own.

    images_000000.safetensors    the rows of images 0 to 499, what making them cost, and pictures for the gallery
    images_000500.safetensors
    manifest.json                whose rows they are: another evaluation's are never taken for this one's

A file is either whole or damaged: the SHA-256 of its tensors stands in its header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.evaluation.rows import Rows, RowTable
from stepdistill.system.files import written_whole
from stepdistill.system.parsing import parse_json

SIZE = 500
"""Images of a shard. Batches do not cross shards, so it is a multiple of usual batches."""
MANIFEST = "manifest.json"
FORMAT = 1
"""Raised when the files change."""


@dataclass(frozen=True)
class Cost:
    """What making images took.

    Attributes:
        timed: images that were drawn while the process did nothing else.
        seconds: wall time of drawing these.
        share: these seconds over the processes that drew at the same time.
        passes: samples through the denoiser.
        peak_memory_bytes: most memory that a process has held.
    """

    timed: int = 0
    seconds: float = 0.0
    share: float = 0.0
    passes: int = 0
    peak_memory_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.timed + other.timed,
            self.seconds + other.seconds,
            self.share + other.share,
            self.passes + other.passes,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
        )


class Shards(RowTable):
    """Rows of ``count`` images in shards; a table of rows once all of them are there.

    Args:
        folder: where they lie.
        count: images.
        name: begins the names of the files.
        size: images of a shard; None is SIZE.
    """

    def __init__(self, folder: Path, count: int, name: str = "images", size: int | None = None) -> None:
        size = size or SIZE
        self.folder, self.count, self.name = folder, count, name
        self.ranges = [range(first, min(first + size, count)) for first in range(0, count, size)]

    def file(self, shard: int) -> Path:
        """Where a shard lies, or will lie."""
        return self.folder / f"{self.name}_{self.ranges[shard].start:06d}.safetensors"

    def missing(self) -> list[int]:
        """The shards that are not there."""
        return [shard for shard in range(len(self.ranges)) if not self.file(shard).exists()]

    def there(self) -> int:
        """Images of the shards that are there."""
        return sum(len(rows) for shard, rows in enumerate(self.ranges) if self.file(shard).exists())

    def check(self) -> None:
        """The shards that are there are whole.

        Raises:
            UserError: naming one that is not.
        """
        for shard, rows in enumerate(self.ranges):
            if self.file(shard).exists():
                tensors, about = _read(self.file(shard))
                lengths = {len(tensor) for name, tensor in tensors.items() if name.startswith("rows.")}
                if about["first"] != rows.start or lengths != {len(rows)}:
                    raise _damaged(
                        self.file(shard), f"not the rows of images {rows.start} to {rows.stop - 1}"
                    )

    def write(self, shard: int, rows: Rows, cost: Cost, pictures: Mapping[int, Tensor] | None = None) -> None:
        """Write one shard; the file is there when it is whole.

        Args:
            shard: its number.
            rows: of its images, in order.
            cost: of making them.
            pictures: uint8 [3, S, S] by index of the image.
        """
        from safetensors.torch import save_file

        pictures = pictures or {}
        self.folder.mkdir(exist_ok=True)  # a temporary one that is gone with the main process stays gone
        tensors = {f"rows.{name}": value.detach().cpu().contiguous() for name, value in rows.items()}
        if pictures:
            tensors["pictures"] = torch.stack(list(pictures.values()))
        about = {
            "first": self.ranges[shard].start,
            "cost": asdict(cost),
            "pictures": list(pictures),
            "sha256": _sha256(tensors),
        }
        with written_whole(self.file(shard)) as temporary:
            save_file(tensors, temporary, metadata={"about": json.dumps(about)})

    def cost(self) -> Cost:
        """Of all images."""
        return sum((Cost(**_about(file)["cost"]) for file in self._files()), Cost())

    def pictures(self) -> dict[int, Tensor]:
        """The pictures of all shards."""
        found: dict[int, Tensor] = {}
        for file in self._files():
            indices = _about(file)["pictures"]
            if indices:
                found |= zip(indices, _tensor(file, "pictures"), strict=True)
        return found

    def tidy(self) -> None:
        """Remove what a killed process left half written."""
        for part in self.folder.glob(f".{self.name}_*.part"):
            part.unlink(missing_ok=True)

    def __contains__(self, name: object) -> bool:
        return bool(self.ranges) and f"rows.{name}" in _names(self.file(0))

    def blocks(self, name: str) -> Iterator[Tensor]:
        for file in self._files():
            yield _tensor(file, f"rows.{name}")

    def _files(self) -> Iterator[Path]:
        return map(self.file, range(len(self.ranges)))


class ShardWriter:
    """Rows of images whose number is not known before the end, into shards.

    Args:
        folder: where they go.
        size: images of a shard; None is SIZE.
    """

    def __init__(self, folder: Path, size: int | None = None) -> None:
        self._folder, self._size = folder, size or SIZE
        self._waiting: list[tuple[Tensor, Rows]] = []
        self.count = self._written = 0

    def add(self, rows: Rows, places: Sequence[int] | None = None) -> None:
        """Take in the rows of a batch.

        Args:
            rows: [B, ...] by name.
            places: of the images among all, from 0; None is after those that came before. Rows wait in memory until
                those before them are there.
        """
        count = len(next(iter(rows.values())))
        given = range(self.count, self.count + count) if places is None else places
        self._waiting.append((torch.tensor(list(given)), rows))
        self.count += count
        if self.count - self._written >= self._size:
            self._write_ready()

    def table(self) -> Shards:
        """All rows; no more are taken in."""
        if self._waiting:
            self._write_ready(last=True)
        return Shards(self._folder, self.count, size=self._size)

    def _write_ready(self, *, last: bool = False) -> None:
        """Writes the shards of which all rows are there."""
        places = torch.cat([places for places, _ in self._waiting])
        order = places.argsort()
        rows = {
            name: torch.cat([some[name] for _, some in self._waiting]).cpu()[order]
            for name in self._waiting[0][1]
        }
        places = places[order]
        expected = torch.arange(self._written, self._written + len(places))
        ready = int((places == expected).long().cumprod(0).sum())  # rows without a gap
        done = 0
        while ready - done >= self._size or (last and done < ready):
            some = {name: value[done : done + self._size] for name, value in rows.items()}
            count = len(next(iter(some.values())))
            shards = Shards(self._folder, self._written + count, size=self._size)
            shards.write(self._written // self._size, some, Cost())
            self._written, done = self._written + count, done + count
        self._waiting = [(places[done:], {name: value[done:].clone() for name, value in rows.items()})]


def claim(folder: Path, key: Mapping[str, Any]) -> None:
    """The folder holds shards of this key, or none: then it is marked as theirs.

    Args:
        folder: of the shards; it is made where it is missing.
        key: all that the rows depend on, for JSON.

    Raises:
        UserError: it holds those of another, or its manifest is damaged.
    """
    file = folder / MANIFEST
    wanted: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "shard": SIZE, **key}))
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        if any(folder.glob("*_*.safetensors")):
            raise UserError(
                f"{folder} holds shards without {MANIFEST}: remove the folder, or give another --output"
            )
        with written_whole(file) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1) + "\n", "utf-8")
        return
    try:
        found = parse_json(file.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a table")
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from None
    differ = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if differ:
        told = ", ".join(
            f"{name} ({_brief(found.get(name))} there, {_brief(wanted.get(name))} here)" for name in differ
        )
        raise UserError(
            f"{folder} holds the rows of another evaluation, of other {told}: remove it, or give another --output"
        )


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] + "..." if len(text) > 40 else text


def _damaged(file: Path, reason: str) -> UserError:
    said = " ".join(reason.split())[:200]
    return UserError(f"{file} is damaged ({said}): remove it, and the same command makes it again")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a shard that is whole, and its header."""
    about, tensors = _about(file), {name: _tensor(file, name) for name in _names(file)}
    if about.get("sha256") != _sha256(tensors):
        raise _damaged(file, "its content is not what was written")
    return tensors, about


def _about(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            about: dict[str, Any] = parse_json(opened.metadata()["about"])
        return about
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(file, str(error)) from None


def _names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return sorted(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, str(error)) from None


def _tensor(file: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor
    except (SafetensorError, OSError) as error:
        raise _damaged(file, str(error)) from None


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
