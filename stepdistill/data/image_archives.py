"""Where images lie: a folder, a zip, an npz, a webdataset tar or an iterator, opened as an ImageSource."""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stepdistill.data.image_names import ENDINGS, is_image, natural, sample_of
from stepdistill.data.image_sources import ImageSource, Reading, Skipped, decode_all
from stepdistill.data.tars import most_unpacked, open_tar
from stepdistill.errors import UserError
from stepdistill.pictures.decoding import LARGEST_FILE, Decoded, Entry, Refused, fit, to_pixels
from stepdistill.system.files import PerProcess

ARCHIVES = (".zip", ".npz", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
STREAMED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Of these zipfile reads no more than it is asked for; of others it unpacks all that four kilobytes stand for."""


def is_source(path: str | Path) -> bool:
    """Whether a path is of a kind that :func:`open_images` reads: a folder or an archive."""
    place = Path(path).expanduser()
    return place.is_dir() or (place.is_file() and place.name.lower().endswith(ARCHIVES))


def open_images(
    images: str | Path | Iterable[Any], *, resolution: int = 0, workers: int | None = None
) -> ImageSource:
    """The images of a folder (nested), a zip, an npz (``arr_0`` uint8 [N, H, W, 3]), a webdataset tar, or an iterable.

    Args:
        images: a path, or an iterable of PIL images and arrays uint8 [H, W, 3].
        resolution: give every image at resolution x resolution pixels; 0 gives each at its own size.
        workers: processes that decode the files of a folder, a zip or a tar; 0 is four threads, None what fits their
            number and the machine. A compressed tar is always left to threads; an npz and an iterable hold pixels.

    Raises:
        UserError: the path is none of these, is damaged as a whole, or holds no image. While iterating: an archive
            that ends too early, or an item of an iterable that is no image.
    """
    if not isinstance(images, (str, Path)):
        return ImageSource("iterator", "iterator", None, [], partial(_items, images, resolution))
    place, label = Path(images).expanduser(), str(images)
    if place.is_dir():
        return _from_folder(place, label, resolution, workers)
    name = place.name.lower()
    if not place.is_file():
        raise UserError(f"images {label} do not exist: give a folder, or a {', '.join(ARCHIVES)} file")
    if not name.endswith(ARCHIVES):
        raise UserError(f"images {label} is one file: give a folder, or a {', '.join(ARCHIVES)} file")
    try:
        if name.endswith(".npz"):
            return _from_npz(place, label, resolution)
        return (_from_zip if name.endswith(".zip") else _from_tar)(place, label, resolution, workers)
    except _DAMAGE as error:
        raise _damaged(label, error) from None


_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError,
)  # fmt: skip
"""What a damaged, shortened or encrypted archive raises (a UserError is a ValueError and passes)."""


def _damaged(label: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(
        f"{label} is damaged, cut off or encrypted ({' '.join(str(error).split())}): make it again"
    )


def _from_folder(folder: Path, label: str, resolution: int, workers: int | None) -> ImageSource:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    entries = [Entry(name, path.read_bytes) for name, path in files.items()]
    chosen, foreign = _sorted_images(entries, label)
    decoded = partial(decode_all, chosen, resolution, "anywhere", workers=workers)
    return ImageSource(label, "folder", len(chosen), foreign, decoded)


def _from_zip(file: Path, label: str, resolution: int, workers: int | None) -> ImageSource:
    archive = PerProcess(partial(zipfile.ZipFile, file))
    members = [info for info in archive().infolist() if not info.is_dir()]
    if (claimed := sum(info.file_size for info in members)) > most_unpacked(file):
        raise UserError(
            f"{label} claims to hold {claimed} bytes, and is {file.stat().st_size} long: unpack it yourself where "
            "that is right, and give the folder"
        )
    entries = [Entry(info.filename, partial(_zipped, archive, info)) for info in members]
    chosen, foreign = _sorted_images(entries, label)
    decoded = partial(decode_all, chosen, resolution, "by process", workers=workers)
    return ImageSource(label, "zip", len(chosen), foreign, decoded)


def _zipped(archive: PerProcess[zipfile.ZipFile], member: zipfile.ZipInfo) -> bytes:
    if member.compress_type not in STREAMED:
        raise Refused("is compressed by bzip2 or LZMA: make the zip with deflate, as zip does by itself")
    return archive().read(_not_too_large(member, member.file_size))


def _from_tar(file: Path, label: str, resolution: int, workers: int | None) -> ImageSource:
    """Fields of a webdataset sample share the name up to its first dot; those that are no images are its companions."""
    compressed = not file.name.lower().endswith(".tar")
    archive = PerProcess(partial(open_tar, file))
    members = [member for member in archive().getmembers() if member.isfile()]
    entries = [Entry(member.name, partial(_tarred, archive, member)) for member in members]
    chosen, foreign = _sorted_images(entries, label)
    whole = {key for key, ending in (sample_of(entry.name) for entry in chosen) if "." not in ending}
    samples = {sample_of(entry.name)[0] for entry in chosen}
    images, skipped, companions = [], [], Counter[str]()
    for entry in chosen:
        key, ending = sample_of(entry.name)
        if "." in ending and key in whole:
            skipped.append(Skipped(entry.name, "another field of a sample that has an image"))
        else:
            images.append(entry)
    for other in foreign:
        key, ending = sample_of(other.name)
        if key in samples:
            companions[ending] += 1
        else:
            skipped.append(other)
    names = {entry.name for entry in images}
    order = [entry.name for entry in entries if entry.name in names]
    if compressed and order != [entry.name for entry in images]:
        raise UserError(f"{label} is compressed and its files are not in the order of their names: unpack it")
    reading: Reading = "in order" if compressed else "by process"
    decoded = partial(decode_all, images, resolution, reading, workers=workers)
    return ImageSource(label, "tar", len(images), skipped, decoded, companions)


def _tarred(archive: PerProcess[tarfile.TarFile], member: tarfile.TarInfo) -> bytes:
    stream = archive().extractfile(_not_too_large(member, member.size))
    return stream.read() if stream is not None else b""


def _from_npz(file: Path, label: str, resolution: int) -> ImageSource:
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "arr_0" not in names:
            raise UserError(
                f"{label} holds {', '.join(names) or 'nothing'}; images are arr_0, uint8 [N, H, W, 3]"
            )
        if archive.getinfo("arr_0.npy").compress_type not in STREAMED:
            raise UserError(
                f"{label}: arr_0 is compressed by bzip2 or LZMA; write it with numpy.savez_compressed"
            )
        with archive.open("arr_0.npy") as stream:
            shape = _array_header(stream, label)

    def pictures() -> Iterator[Decoded]:
        size = int(np.prod(shape[1:]))
        try:
            with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as stream:
                _array_header(stream, label)
                for i in range(shape[0]):
                    data = stream.read(size)
                    if len(data) < size:
                        raise UserError(f"{label} is cut off: arr_0 ends in image {i} of {shape[0]}")
                    pixels = np.frombuffer(data, np.uint8).reshape(shape[1:])
                    yield Decoded(f"arr_0[{i}]", *fit(pixels, resolution, ()))
        except _DAMAGE as error:
            raise _damaged(label, error) from None

    return ImageSource(label, "npz", shape[0], [], pictures)


def _array_header(stream: Any, label: str) -> tuple[int, ...]:
    """The shape of an array of images, read from the head of its npy stream."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise UserError(f"{label}: arr_0 is of npy version {version}; write it with numpy.savez")
    shape, fortran, dtype = read[version](stream)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or min(shape[1:]) < 1:
        raise UserError(
            f"{label}: arr_0 is {dtype} {list(shape)}; images are uint8 [N, H, W, 3] (no floats, no NaN)"
        )
    if shape[1] * shape[2] > LARGEST_FILE:
        raise UserError(
            f"{label}: arr_0 is of images of {shape[1]} x {shape[2]} pixels; {LARGEST_FILE} are allowed"
        )
    if shape[0] < 1:
        raise UserError(f"{label} holds no images: arr_0 is empty")
    return tuple(shape)


def _items(images: Iterable[Any], resolution: int) -> Iterator[Decoded]:
    for i, item in enumerate(images):
        name = f"image {i}"
        try:
            if isinstance(item, Image.Image):
                yield Decoded(name, *to_pixels(item, resolution))
                continue
            if not isinstance(item, np.ndarray):
                raise Refused(f"is a {type(item).__name__}")
            if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or item.size == 0:
                nan = " with NaN" if item.dtype.kind == "f" and np.isnan(item).any() else ""
                raise Refused(f"is {item.dtype} {list(item.shape)}{nan}")
        except Refused as refused:
            raise UserError(
                f"{name} {refused}; give PIL images, or arrays uint8 [H, W, 3] in 0..255"
            ) from None
        yield Decoded(name, *fit(item, resolution, ()))


def _sorted_images(entries: list[Entry], label: str) -> tuple[list[Entry], list[Skipped]]:
    """The entries that end like images, in the order of their names, and the others."""
    ordered = sorted(entries, key=lambda entry: natural(entry.name))
    chosen = [entry for entry in ordered if is_image(entry.name)]
    foreign = [Skipped(entry.name, "not an image file") for entry in ordered if not is_image(entry.name)]
    if not chosen:
        others = f"only {len(foreign)} other files ({foreign[0].name}, ...)" if foreign else "it is empty"
        raise UserError(f"{label} holds no images: {others}; images end in {', '.join(sorted(ENDINGS))}")
    return chosen, foreign


def _not_too_large(member: Any, size: int) -> Any:
    if size > LARGEST_FILE:
        raise Refused(f"claims {size} bytes; {LARGEST_FILE} are allowed")
    return member
