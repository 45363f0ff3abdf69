"""Floats to pixels, pixels to a grid, a grid to a PNG: the last stage of the generation path.

Also what shows the decoder at work: the tokens after every step side by side or one after another,
and when each of them was decided.
"""

import functools
import math
import os
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

BACKGROUND = 255
# Of cells that hold no code yet, and, in a heat map, of those that were known from the start.
UNDECIDED = 128
# Colours from early to late, evenly spaced; between them colours are mixed. Lightness rises in
# almost even steps (CIE L* 11, 34, 53, 71, 91), so the order survives without colour too.
RAMP = ((32, 18, 77), (130, 40, 129), (215, 81, 88), (246, 150, 62), (252, 230, 150))
# What the GIF format can say, in hundredths of a second; browsers slow down what is faster.
_MIN_DELAY, _MAX_DELAY = 2, 65535


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


def quantize(images: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Turn floats in [-1, 1] into the pixels of `to_uint8` inside a compiled program.

    There values cannot be read: what is NaN or infinite is the caller's to refuse.
    """
    # Clipped before the shift, not after it: else a compiler may make one operation of product and
    # sum, which rounds once and not twice, and takes another grey level now and then.
    scaled = jnp.clip(images.astype(jnp.float32) * 127.5, -127.5, 127.5)
    return jnp.rint(scaled + 127.5).astype(jnp.uint8)


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


def grey_out(
    images: UInt8[np.ndarray, "*n H W c"], cells: Bool[np.ndarray, "*n gh gw"]
) -> UInt8[np.ndarray, "*n H W c"]:
    """Return images with the pixels of the marked cells replaced by a flat grey.

    Raises:
      ValueError: a side of the images is no multiple of the cells'.
    """
    height, width = images.shape[-3:-1]
    rows, columns = cells.shape[-2:]
    if height % rows or width % columns:
        raise ValueError(f"{height}×{width} pixels are not divisible by {rows}×{columns} cells")
    marked = cells.repeat(height // rows, -2).repeat(width // columns, -1)
    return np.where(marked[..., None], np.uint8(UNDECIDED), images)


def contact_sheet(
    steps: UInt8[np.ndarray, "t b H W c"], *, padding: int = 2, scale: int = 1
) -> UInt8[np.ndarray, "H2 W2 c"]:
    """Lay pictures of every step out: a row for each image, a column for each step."""
    pictures = np.swapaxes(steps, 0, 1).reshape(-1, *steps.shape[2:])
    return make_grid(pictures, columns=len(steps), padding=padding, scale=scale)


def decided_at(
    trace: Int[np.ndarray, "t b gh gw"],
    mask_token_id: int,
    known: Bool[np.ndarray, "b gh gw"] | None = None,
) -> Int[np.ndarray, "b gh gw"]:
    """Return in which step, from 0 on, each token was decided.

    That is the last step before which it was masked: one that was taken back counts from when it
    was decided again.

    Args:
      trace: tokens after every step.
      mask_token_id: what masked ones hold.
      known: tokens that were given, as in an edit; the result for them is -1. A trace does not tell
        them from those decided in the first step.

    Raises:
      ValueError: the trace is empty, tokens are masked at its end, or `known` is not of bools.
    """
    if known is not None and np.asarray(known).dtype != bool:
        raise ValueError(
            f"known has type {np.asarray(known).dtype}; give bool [b gh gw], true where a "
            "token was given, not the tokens"
        )
    masked = np.asarray(trace) == mask_token_id
    if not len(masked) or masked[-1].any():
        raise ValueError(
            f"{masked[-1:].sum()} tokens are masked at the end of the {len(masked)} steps of this "
            "trace; give the trace of a whole generation"
        )
    last = len(masked) - 1 - np.argmax(masked[::-1], axis=0)
    steps = np.where(masked.any(0), last + 1, 0)
    return (steps if known is None else np.where(known, -1, steps)).astype(np.int32)


def heat_map(
    steps: Int[np.ndarray, "b gh gw"], num_steps: int, factor: int
) -> UInt8[np.ndarray, "b H W 3"]:
    """Colour cells by step: dark violet for the first, over red, to light yellow for the last.

    Args:
      steps: 0…num_steps-1, or -1 for what was known from the start, which is grey.
      num_steps: T, at least 1; colours are the same for equal T.
      factor: pixels per cell, along each side.

    Raises:
      ValueError: a step is out of range, or the factor below 1.
    """
    if steps.size and not -1 <= steps.min() <= steps.max() < num_steps:
        raise ValueError(
            f"steps from {steps.min()} to {steps.max()} are out of range; allowed: 0 to "
            f"{num_steps - 1}, or -1 for known tokens"
        )
    if factor < 1:
        raise ValueError(f"factor {factor} is out of range; allowed: 1 or more pixels per cell")
    places = np.linspace(0, 1, len(RAMP))
    shares = np.arange(num_steps) / max(num_steps - 1, 1)
    channels = [np.interp(shares, places, channel) for channel in zip(*RAMP, strict=True)]
    # The last row is for -1.
    colours = np.rint(np.stack(channels, -1)).astype(np.uint8)
    colours = np.concatenate([colours, np.full((1, 3), UNDECIDED, np.uint8)])
    return colours[steps].repeat(factor, 1).repeat(factor, 2)


def save_png(
    path: str | os.PathLike, image: Array | np.ndarray, *, make_folders: bool = True
) -> None:
    """Write one uint8 image [H W c] as a PNG file; it appears whole or not at all.

    Folders on the way are made unless `make_folders` is false, an existing file is replaced.

    Raises:
      FileNotFoundError: a folder is missing, and is not to be made.
      ValueError: not uint8 [H W 1 or 3], or `path` does not end in .png.
    """
    image = np.asarray(image)
    _check_pixels(image, ndim=3)
    save = functools.partial(_to_pillow(image).save, format="PNG")
    _write(path, ".png", save, make_folders=make_folders)


def save_gif(path: str | os.PathLike, frames: Array | np.ndarray, seconds_per_frame: float) -> None:
    """Write uint8 frames [t H W c] as an endless animation; the file appears whole or not at all.

    All frames share one palette of at most 256 colours, so nothing flickers; with no more than
    that in all, colours are kept exactly. Folders on the way are made, an existing file is
    replaced.

    Args:
      path: ends in .gif.
      frames: pictures in their order.
      seconds_per_frame: 0.02 to 655.35, rounded to hundredths.

    Raises:
      ValueError: not uint8 [t H W 1 or 3], or time or `path` are not allowed.
    """
    frames = np.asarray(frames)
    _check_pixels(frames, ndim=4)
    delay = round(seconds_per_frame * 100) if math.isfinite(seconds_per_frame) else -1
    if not _MIN_DELAY <= delay <= _MAX_DELAY:
        raise ValueError(
            f"seconds_per_frame {seconds_per_frame} is out of range; allowed: "
            f"{_MIN_DELAY / 100} to {_MAX_DELAY / 100}"
        )
    count, height, width, channels = frames.shape
    strip = _to_pillow(frames.reshape(count * height, width, channels))
    if channels == 3:
        strip = strip.quantize(dither=Image.Dither.NONE)
    boxes = [(0, height * index, width, height * (index + 1)) for index in range(count)]
    first, *rest = (strip.crop(box) for box in boxes)
    options = dict(save_all=True, append_images=rest, duration=10 * delay, loop=0)
    _write(path, ".gif", lambda partial: first.save(partial, format="GIF", **options))


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _write(
    path: str | os.PathLike,
    suffix: str,
    save: Callable[[pathlib.Path], None],
    *,
    make_folders: bool = True,
) -> None:
    path = pathlib.Path(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path} does not end in {suffix}")
    if make_folders:
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_pixels(images: np.ndarray, *, ndim: int) -> None:
    if images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype}; expected uint8, as to_uint8 gives")
    if images.ndim != ndim or 0 in images.shape or images.shape[-1] not in (1, 3):
        expected = "[b H W c]" if ndim == 4 else "[H W c]"
        raise ValueError(f"shape {images.shape}; expected {expected}, not empty, c = 1 or 3")
