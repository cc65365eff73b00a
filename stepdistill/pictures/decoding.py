"""One image file to 8-bit RGB, or the reason why not: the rules that ``image_sources`` states."""

from __future__ import annotations

import errno
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

from stepdistill.errors import UserError
from stepdistill.system.shipped import LFS

if TYPE_CHECKING:
    from numpy.typing import NDArray


LARGEST_FILE = 1 << 28
"""Bytes; a member of an archive that claims more is refused."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_PASSING = {
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR),
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH),
}
"""What the system says when it cannot read now, which says nothing of the file."""


class Refused(Exception):
    """Why an image is not used."""


class Entry(NamedTuple):
    """An image file.

    Attributes:
        name: as results call it.
        read: gives its bytes; picklable, for processes that are spawned.
    """

    name: str
    read: Callable[[], bytes]


class Decoded(NamedTuple):
    """An image, or why there is none.

    Attributes:
        name: of its file.
        pixels: uint8 [H, W, 3], or None.
        notes: what was converted, or, without pixels, the reason.
    """

    name: str
    pixels: NDArray[np.uint8] | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Nearest:
    """Of several sizes the one whose aspect ratio is nearest to an image's own.

    Attributes:
        sizes: heights and widths.
    """

    sizes: tuple[tuple[int, int], ...]

    def of(self, height: int, width: int) -> tuple[int, int]:
        """The size for an image."""
        return min(self.sizes, key=lambda size: abs(math.log(size[0] * width / (size[1] * height))))


Size = int | tuple[int, int] | Nearest
"""Of pixels: a square's side, or height and width, or of several what fits best; 0 leaves an image at its own size."""


def most_pixels(size: Size) -> int:
    """Pixels of the largest image of a size; 0 where that is not known."""
    if isinstance(size, Nearest):
        return max(height * width for height, width in size.sizes)
    return size**2 if isinstance(size, int) else size[0] * size[1]


def decode(name: str, read: Callable[[], bytes], size: Size, *, upright: bool = False) -> Decoded:
    """An image file's pixels, or the reason why not, whatever is wrong with it.

    Args:
        name: of the file.
        read: gives its bytes.
        size: see :func:`fit`.
        upright: turn it as its EXIF says that the camera was held.

    Raises:
        UserError: the system cannot read it now, as where too many files are open or a drive does not answer.
    """
    try:
        content = read()
        if content.startswith(LFS):
            raise Refused("is a Git LFS pointer, not the image: run git lfs pull where it lies")
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return Decoded(name, *to_pixels(image, size, upright=upright))
    except Refused as refused:
        return Decoded(name, None, (str(refused),))
    except OSError as error:
        if error.errno in _PASSING:  # what were kept without it would lack it for good
            raise UserError(f"{name} cannot be read now: {error.strerror}") from None
        return Decoded(name, None, (unreadable(error),))
    except Exception as error:  # a damaged file can raise anything in a decoder
        return Decoded(name, None, (unreadable(error),))


def unreadable(error: Exception) -> str:
    """Why a file is not used, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot be read: it is none of " + ", ".join(FORMATS)
    return f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"


def to_pixels(
    image: Image.Image, size: Size, *, upright: bool = False
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """8-bit RGB and what was converted, or Refused with the reason."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a photograph and its previews
        raise Refused(f"animated or of several pages ({getattr(image, 'n_frames', 1)}): save one frame")
    if image.mode in ("I", "F") or image.mode.startswith("I;") or _is_deep(image):
        raise Refused("not 8-bit (16-bit, 32-bit or float): save it with 8 bits a channel")
    if image.mode not in ("RGB", "RGBA", "LA", "PA", "L", "1", "P", "CMYK"):
        raise Refused(f"of mode {image.mode}: save it as RGB")
    notes: tuple[str, ...] = ()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            raise Refused("has transparent pixels: put it on a background first")
        notes = ("opaque alpha dropped",)
    elif image.mode != "RGB":
        notes = ({"P": "palette to RGB", "CMYK": "CMYK to RGB"}.get(image.mode, "grayscale to RGB"),)
    if upright and image.getexif().get(Base.Orientation, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
        notes = (*notes, "turned upright (EXIF orientation)")
    return fit(np.asarray(image.convert("RGB")), size, notes)


def _is_deep(image: Image.Image) -> bool:
    """More than 8 bits a channel, which PIL would cut to 8: its decoders' arguments say so."""
    for tile in getattr(image, "tile", []):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(value, str) and ";16" in value for value in arguments):
            return True
        if image.format == "PPM" and any(isinstance(value, int) and value > 255 for value in arguments):
            return True
    return False


def fit(
    pixels: NDArray[np.uint8], size: Size, notes: tuple[str, ...]
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """The central part of the size's aspect ratio, by PIL's Lanczos filter, where the size is another."""
    if isinstance(size, Nearest):
        size = size.of(*pixels.shape[:2])
    height, width = (size, size) if isinstance(size, int) else size
    if not height or pixels.shape[:2] == (height, width):
        return pixels, notes
    fitted = ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted), (*notes, f"cropped and resized to {width}x{height} (Lanczos)")
