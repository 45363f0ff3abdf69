"""Coloured handwritten digits on black canvases of several shapes, as many as one likes.

The embedded dataset of pictures that have a content to talk about: which digits, how many, in which
colours, where. Each is drawn from scikit-learn's real digits (`digits`; a test canvas has test
digits only), and the `Scene` beside it says exactly what is on it. A canvas is divided into square
cells, and each digit stands in one, so that little data and a small model suffice to learn where
things are. Start of the training path of the canvas tokenizer; captions, and the check of pictures
made from them, build on `Scene`.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8
from PIL import Image

from maskgil_jax.data.digits import SPLITS, digits_arrays

Size = tuple[int, int]

# Height and width of the canvases of a mixed source.
SIZES: tuple[Size, ...] = (
    (64, 64),
    (64, 96),
    (96, 64),
    (64, 128),
    (128, 64),
    (96, 96),
)
CELL_PX = 32  # side of a cell; the sides of a canvas are multiples of it
MIN_SIZE, MAX_SIZE = 64, 128

# Full ink of each colour. One channel is always 255, so the largest channel of a pixel is its ink,
# and the direction of its RGB vector is its colour, however thin the stroke is there.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 24, 24),
    "yellow": (255, 240, 40),
    "green": (24, 255, 48),
    "cyan": (0, 230, 255),
    "blue": (48, 72, 255),
    "pink": (255, 64, 224),
    "white": (255, 255, 255),
}

NUM_CANVASES = {"train": 1_000_000, "test": 10_000}
MAX_DIGITS = 3
# Share of the canvases of several digits on which they are all the same digit: drawn freely, "three
# sevens" would be on one canvas in 300 and nothing could learn to count them.
SAME_DIGIT_SHARE = 0.3
# Side of a digit's scan, which is in the middle of its cell: neighbours do not touch.
DIGIT_PX = 28

# Ink of the scan up to the first value is paper, from the second on it is full; between them lies a
# soft edge. A scan is blurred by its 8×8 pixels: without this no pixel has full colour.
_PAPER, _FULL = 0.15, 0.7


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One digit on a canvas.

    Attributes:
      digit: 0..9.
      colour: a name in `COLOURS`.
      box: top, left, bottom, right in pixels, half-open, the smallest that holds all its ink.
      row: which digit of the split it is, as `digits_arrays` orders them.
    """

    digit: int
    colour: str
    box: tuple[int, int, int, int]
    row: int

    @property
    def position(self) -> tuple[float, float]:
        """Middle of the box, in pixels from the top and from the left."""
        top, left, bottom, right = self.box
        return (top + bottom) / 2, (left + right) / 2

    def is_left_of(self, other: "SceneObject") -> bool:
        """Tell whether all of it is left of all of the other."""
        return self.box[3] <= other.box[1]

    def is_above(self, other: "SceneObject") -> bool:
        """Tell whether all of it is above all of the other."""
        return self.box[2] <= other.box[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What is on a canvas.

    Attributes:
      size: height and width of the canvas in pixels.
      objects: the digits in the order they were placed, which says nothing about where they are.
        Boxes do not overlap, so of any two one is left of, or above, the other, or both.
    """

    size: Size
    objects: tuple[SceneObject, ...]


class CanvasSource:
    """Give canvases as `{"image": uint8 [H W 3], "label": int32 []}`; the label is the count - 1.

    Record i is a function of (seed, split, i, size) alone. There are a million for training, so
    that a run hardly sees one twice, and 10,000 for testing.

    Args:
      split: "train" or "test", of the digits too.
      size: height and width of all canvases; None draws one of `SIZES` for each.
      seed: 0 or more; another one gives other canvases of the same digits.

    Raises:
      ValueError: unknown split, a size that is not allowed, or a negative seed.
    """

    num_classes = MAX_DIGITS

    def __init__(self, split: str = "train", size: Size | None = None, *, seed: int = 0):
        _check_split(split)
        if size is not None:
            check_size(size)
        if seed < 0:
            raise ValueError(f"seed = {seed}; give 0 or more")
        self.split, self.size, self.seed = split, size, seed
        shape = "mixed" if size is None else "{}x{}".format(*size)
        self.name = f"canvases/{split}/{shape}/seed {seed}"

    def __len__(self) -> int:
        return NUM_CANVASES[self.split]

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        image, scene = self.draw(index)
        return {"image": image, "label": np.asarray(len(scene.objects) - 1, np.int32)}

    def draw(self, index: SupportsIndex) -> tuple[UInt8[np.ndarray, "H W 3"], Scene]:
        """Return the picture of record `index` and what is on it.

        Raises:
          IndexError: there is no such record.
        """
        row = operator.index(index)
        if not 0 <= row < len(self):
            raise IndexError(f"canvas {row} of {self.name}; allowed 0..{len(self) - 1}")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), row))
        size = SIZES[rng.integers(len(SIZES))] if self.size is None else self.size
        return draw_scene(rng, self.split, size)

    def __repr__(self) -> str:
        return f"CanvasSource(split={self.split!r}, size={self.size}, seed={self.seed})"


def draw_scene(
    rng: np.random.Generator, split: str, size: Size
) -> tuple[UInt8[np.ndarray, "H W 3"], Scene]:
    """Draw one to three digits of a split, each in a cell of a canvas of `size` (height, width).

    Number, digits, colours and cells are uniform, but for a share of canvases that repeat one
    digit.

    Raises:
      ValueError: unknown split, or sides that are not multiples of 32 from 64 to 128.
    """
    _check_split(split)
    check_size(size)
    count = int(rng.integers(1, MAX_DIGITS + 1))
    kinds = rng.integers(10, size=count)
    if rng.random() < SAME_DIGIT_SHARE:
        kinds[:] = kinds[0]
    rows = _draw_rows(rng, split, kinds.tolist())
    colours = [tuple(COLOURS)[i] for i in rng.integers(len(COLOURS), size=count)]
    return _paint(rng, split, size, rows, colours)


def draw_digits(
    rng: np.random.Generator,
    split: str,
    size: Size,
    digits: Sequence[int],
    colours: Sequence[str],
) -> tuple[UInt8[np.ndarray, "H W 3"], Scene]:
    """Draw the given digits in the given colours, else as `draw_scene` does.

    Raises:
      ValueError: unknown split, a size that is not allowed, not one to three digits with a colour
        each, or digits or colours that there are not.
    """
    _check_split(split)
    check_size(size)
    if not 1 <= len(digits) == len(colours) <= MAX_DIGITS:
        raise ValueError(
            f"{len(digits)} digits and {len(colours)} colours; allowed: 1 to {MAX_DIGITS} digits, "
            "and a colour for each"
        )
    for digit, colour in zip(digits, colours, strict=True):
        if digit not in range(10) or colour not in COLOURS:
            raise ValueError(
                f"digit {digit!r} in {colour!r}; allowed: 0..9 in one of {', '.join(COLOURS)}"
            )
    return _paint(rng, split, size, _draw_rows(rng, split, digits), colours)


def _paint(
    rng: np.random.Generator, split: str, size: Size, rows: list[int], colours: Sequence[str]
) -> tuple[UInt8[np.ndarray, "H W 3"], Scene]:
    image = np.zeros((*size, 3), np.uint8)
    labels = _load_scans(split)[1]
    columns = size[1] // CELL_PX
    cells = rng.choice(size[0] // CELL_PX * columns, size=len(rows), replace=False)
    objects = []
    for row, colour, cell in zip(rows, colours, cells.tolist(), strict=True):
        ink, (down, across) = _load_inks(split)[row]
        top, left = cell // columns * CELL_PX + down, cell % columns * CELL_PX + across
        bottom, right = top + ink.shape[0], left + ink.shape[1]
        image[top:bottom, left:right] = np.rint(ink[..., None] * np.array(COLOURS[colour]))
        box = (top, left, bottom, right)
        objects.append(SceneObject(digit=int(labels[row]), colour=colour, box=box, row=row))
    return image, Scene(size=size, objects=tuple(objects))


def _draw_rows(rng: np.random.Generator, split: str, digits: Sequence[int]) -> list[int]:
    """Choose a scan of the split for each digit."""
    rows = _rows_by_digit(split)
    return [int(rng.choice(rows[digit])) for digit in digits]


@functools.cache
def _load_scans(split: str) -> tuple[Float32[np.ndarray, "b 32 32"], Int32[np.ndarray, " b"]]:
    """Return the ink (0..1) and the labels of the split's digits."""
    images, labels = digits_arrays(split)
    return images[..., 0].astype(np.float32) / 255, labels


@functools.cache
def _load_inks(split: str) -> list[tuple[Float32[np.ndarray, "_ _"], tuple[int, int]]]:
    """Return the ink (0..1) of each digit, cut to its box, and the box's corner in a cell."""
    margin = (CELL_PX - DIGIT_PX) // 2
    inks = []
    for scan in _load_scans(split)[0]:
        small = Image.fromarray(scan).resize((DIGIT_PX, DIGIT_PX), Image.Resampling.BICUBIC)
        ink = (np.asarray(small) - np.float32(_PAPER)) / np.float32(_FULL - _PAPER)
        np.clip(ink, 0, 1, out=ink)
        # What would round to nothing in every colour is no ink.
        there = ink >= 1 / 255
        lines, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
        cut = ink[lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1]
        inks.append((cut, (margin + int(lines[0]), margin + int(columns[0]))))
    return inks


@functools.cache
def _rows_by_digit(split: str) -> list[Int[np.ndarray, " n"]]:
    return [np.flatnonzero(_load_scans(split)[1] == digit) for digit in range(10)]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the canvases; allowed: {SPLITS}")


def check_size(size: Size) -> None:
    """Raise a `ValueError` for a height and width that no canvas has."""
    if len(size) != 2 or any(side % CELL_PX or not MIN_SIZE <= side <= MAX_SIZE for side in size):
        raise ValueError(
            f"canvas size {size}; allowed: height and width that are multiples of {CELL_PX} "
            f"from {MIN_SIZE} to {MAX_SIZE}, such as {SIZES[1]}"
        )
