"""Encoded image files to RGB pixels, and what to do when one cannot be read."""

import io
import operator
import pathlib
import struct
import warnings
from collections.abc import Callable
from typing import Any, SupportsIndex, TypeVar

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from maskgil_jax.data.errors import ImageReadError

# What Pillow raises for damaged files, by format and by place of the damage.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)

# The EXIF tag, and its values for images that lie on a side.
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)

Record = dict[str, Any]
_T = TypeVar("_T")


def decode_rgb(
    file: str | pathlib.Path | bytes, *, upright: bool = False
) -> UInt8[np.ndarray, "H W 3"]:
    """Decode one image file, or its bytes, to RGB.

    Greyscale is repeated, 16-bit greyscale scaled down, CMYK converted, and transparency laid over
    white.

    Args:
      file: its path, or its bytes.
      upright: whether to apply the EXIF orientation. Data sets are read without: the reference
        statistics of ImageNet were made so.

    Raises:
      ImageReadError: the file is missing, truncated or no readable image.
    """
    return np.asarray(_read(file, _to_rgb, upright))


def decode_mask(file: str | pathlib.Path | bytes) -> Bool[np.ndarray, "H W"]:
    """Decode a black and white picture, upright: true where its grey is 128 or more of 255.

    Raises:
      ImageReadError: the file is missing, truncated, no readable image, or partly transparent.
    """
    return np.asarray(_read(file, _to_grey, True)) >= 128


def read_size(file: str | pathlib.Path | bytes, *, upright: bool = False) -> tuple[int, int]:
    """Return height and width in pixels from the header of an image file, or of its bytes.

    Args:
      file: its path, or its bytes, of which the header is enough.
      upright: whether to apply the EXIF orientation.

    Raises:
      ImageReadError: the file is missing or no image.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            # Pillow turns TIFF files itself. Its method for PNG files would decode the image, to
            # find what may stand behind it.
            is_lying = Image.Image.getexif(image).get(_ORIENTATION, 1) in _LYING
            turned = upright and is_lying and image.format != "TIFF"
            return (image.width, image.height) if turned else (image.height, image.width)
    except _PILLOW_ERRORS as error:
        raise ImageReadError(_explain(error)) from error


def _read(
    file: str | pathlib.Path | bytes, convert: Callable[[Image.Image], Image.Image], upright: bool
) -> Image.Image:
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.load()
            return convert(ImageOps.exif_transpose(image) if upright else image)
    except ImageReadError:
        raise
    except _PILLOW_ERRORS as error:
        raise ImageReadError(_explain(error)) from error


class TolerantReader:
    """Read records by index, putting the next readable one in place of up to `max_bad_images`.

    Which record stands in depends on the index alone, so every epoch, process and resumed run sees
    the same. The count starts anew in each process.

    Args:
      read: index → record; raises ImageReadError if its image cannot be read.
      describe: index → the name of the image in messages.
    """

    def __init__(
        self,
        read: Callable[[int], Record],
        describe: Callable[[int], str],
        length: int,
        max_bad_images: int,
    ):
        if max_bad_images < 0:
            raise ValueError(f"max_bad_images = {max_bad_images}; give 0 (none) or more")
        self._read = read
        self._describe = describe
        self._length = length
        self._max_bad_images = max_bad_images
        self._bad: dict[int, str] = {}

    @property
    def bad_images(self) -> tuple[str, ...]:
        """The unreadable images met so far."""
        return tuple(self._bad.values())

    def __getitem__(self, index: SupportsIndex) -> Record:
        return self.apply(self._read, index)

    def apply(self, read: Callable[[int], _T], index: SupportsIndex) -> _T:
        """Read something else of a record, such as its image's size, or of the one that stands in.

        `read` raises ImageReadError, as the reader of records does.
        """
        first = range(self._length)[operator.index(index)]
        for candidate in range(first, first + self._length):
            candidate %= self._length
            try:
                return read(candidate)
            except ImageReadError as error:
                self._note(candidate, error)
        raise ImageReadError(f"all {self._length} images are unreadable")

    def _note(self, index: int, error: ImageReadError) -> None:
        """Count an unreadable image, and warn of it or refuse."""
        is_new = index not in self._bad
        self._bad[index] = self._describe(index)
        message = (
            f"cannot read image {self._bad[index]}: {error} "
            f"({len(self._bad)} unreadable so far, {self._max_bad_images} allowed)"
        )
        if len(self._bad) > self._max_bad_images:
            raise ImageReadError(
                f"{message}; repair or remove it, or allow some with max_bad_images"
            ) from error
        if is_new:
            warnings.warn(f"{message}; the next readable image stands in", stacklevel=4)


def _explain(error: Exception) -> str:
    """Say what is wrong without the file's name, which the reader adds."""
    if isinstance(error, UnidentifiedImageError):
        return "its content is no known image format"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _to_grey(image: Image.Image) -> Image.Image:
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else 255
    if np.min(np.asarray(alpha)) < 255:
        raise ImageReadError("parts of the mask are transparent; save it in black and white")
    return _to_rgb(image).convert("L")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip instead of scale
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageReadError(f"mode {image.mode} has no known range; store it as 8-bit RGB or grey")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
