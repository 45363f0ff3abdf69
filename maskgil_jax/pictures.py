"""Floats to pixels, pixels to a grid, a grid to a PNG: the last stage of the generation path."""

import math
import os
import pathlib

import numpy as np
from jax import Array
from jaxtyping import Float, UInt8
from PIL import Image

BACKGROUND = 255


def to_uint8(images: Array | np.ndarray) -> UInt8[np.ndarray, "..."]:
    """Turn floats in [-1, 1], of any shape, into pixels: 127.5·x + 127.5, rounded and clipped.

    Never stretched to an image's own range, which would change what is measured on it.

    Raises:
      ValueError: the input holds integers, NaN or infinity.
    """
    images = np.asarray(images)
    if images.dtype.kind in "biu":
        raise ValueError(f"images are {images.dtype}; expected floats in [-1, 1]")
    images = images.astype(np.float32)
    if not np.isfinite(images).all():
        bad = images.size - np.isfinite(images).sum()
        raise ValueError(f"{bad} of {images.size} pixel values are NaN or infinite")
    return np.clip(np.rint(images * 127.5 + 127.5), 0, 255).astype(np.uint8)


def to_float(images: np.ndarray) -> Float[np.ndarray, "..."]:
    """Turn uint8 pixels into floats in [-1, 1], x / 127.5 - 1: what tokenizers encode.

    Raises:
      ValueError: the input is not uint8.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype}; expected uint8 pixels")
    return images.astype(np.float32) / 127.5 - 1


def make_grid(
    images: Array | np.ndarray, *, columns: int | None = None, padding: int = 2, scale: int = 1
) -> UInt8[np.ndarray, "H W c"]:
    """Lay uint8 images [b H W c] out in rows, the first at the top left, on white.

    `columns` defaults to the smallest square that holds all, `padding` is in pixels between and
    around the images, and each pixel becomes `scale` × `scale`.

    Raises:
      ValueError: not uint8 [b H W 1 or 3], no images, or columns, padding or scale out of range.
    """
    images = np.asarray(images)
    _check_pixels(images, ndim=4)
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1 or padding < 0 or scale < 1:
        raise ValueError(
            f"columns = {columns}, padding = {padding}, scale = {scale}; allowed >= 1, >= 0, >= 1"
        )
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    b, height, width, channels = images.shape
    rows, step_y, step_x = math.ceil(b / columns), height + padding, width + padding
    shape = (rows * step_y + padding, min(b, columns) * step_x + padding, channels)
    grid = np.full(shape, BACKGROUND, np.uint8)
    for index, image in enumerate(images):
        y, x = padding + index // columns * step_y, padding + index % columns * step_x
        grid[y : y + height, x : x + width] = image
    return grid


def save_png(path: str | os.PathLike, image: Array | np.ndarray) -> None:
    """Write one uint8 image [H W c] as a PNG file; it appears whole or not at all.

    Folders on the way are made, an existing file is replaced.

    Raises:
      ValueError: not uint8 [H W 1 or 3], or `path` does not end in .png.
    """
    path = pathlib.Path(path)
    image = np.asarray(image)
    _check_pixels(image, ndim=3)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} does not end in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        picture.save(partial, format="PNG")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_pixels(images: np.ndarray, *, ndim: int) -> None:
    if images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype}; expected uint8, as to_uint8 gives")
    if images.ndim != ndim or 0 in images.shape or images.shape[-1] not in (1, 3):
        expected = "[b H W c]" if ndim == 4 else "[H W c]"
        raise ValueError(f"shape {images.shape}; expected {expected}, not empty, c = 1 or 3")
