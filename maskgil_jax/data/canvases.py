"""Coloured handwritten digits on black canvases of several shapes, as many as one likes.

The embedded dataset of pictures that have a content to talk about: which digits, how many, in which
colours, where. Each is drawn from scikit-learn's real digits (`digits`; a test canvas has test
digits only), and the `Scene` beside it says exactly what is on it. Start of the training path of
the canvas tokenizer; captions, and the check of pictures made from them, build on `Scene`.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8
from PIL import Image

from maskgil_jax.data.digits import IMAGE_SIZE, SPLITS, digits_arrays

Size = tuple[int, int]

# Height and width of the canvases of a mixed source.
SIZES: tuple[Size, ...] = (
    (64, 64),
    (64, 96),
    (96, 64),
    (64, 128),
    (128, 64),
    (96, 96),
    (128, 128),
)
SIZE_MULTIPLE = 16
MIN_SIZE, MAX_SIZE = 64, 128

# Full ink of each colour. One channel is always 255, so the largest channel of a pixel is its ink,
# and the direction of its RGB vector is its colour, however thin the stroke is there.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 24, 24),
    "orange": (255, 128, 0),
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
MIN_DIGIT_PX, MAX_DIGIT_PX = 24, 48  # side of a digit's scan, 8×8 cells, on the canvas
MAX_ROTATION_DEG = 10.0
GAP_PX = 3  # between the boxes of two digits

# Ink of the enlarged scan up to the first value is paper, from the second on it is full; between
# them lies a soft edge. A scan is blurred by its 8×8 cells: without this no pixel has full colour.
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
            _check_size(size)
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
    """Draw one to three digits of a split somewhere on a canvas of `size` (height, width).

    Number, digits, colours, sizes (24..48 px), rotations (up to 10° to either side) and places are
    uniform, but for a share of canvases that repeat one digit. What does not fit together on a
    small canvas is drawn anew with other sizes, so digits there are smaller on average.

    Raises:
      ValueError: unknown split, or sides that are not multiples of 16 from 64 to 128.
    """
    _check_split(split)
    _check_size(size)
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
    _check_size(size)
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
    inks, boxes = _arrange(rng, split, rows, size)

    image = np.zeros((*size, 3), np.uint8)
    labels = _load_scans(split)[1]
    objects = []
    for row, colour, ink, box in zip(rows, colours, inks, boxes, strict=True):
        top, left, bottom, right = box
        image[top:bottom, left:right] = np.rint(ink[..., None] * np.array(COLOURS[colour]))
        objects.append(SceneObject(digit=int(labels[row]), colour=colour, box=box, row=row))
    return image, Scene(size=size, objects=tuple(objects))


def _draw_rows(rng: np.random.Generator, split: str, digits: Sequence[int]) -> list[int]:
    """Choose a scan of the split for each digit."""
    rows = _rows_by_digit(split)
    return [int(rng.choice(rows[digit])) for digit in digits]


def _arrange(
    rng: np.random.Generator, split: str, rows: list[int], size: Size
) -> tuple[list[Float32[np.ndarray, "_ _"]], list[tuple[int, int, int, int]]]:
    """Size, turn and place the digits; begin anew when one finds no place.

    Ends soon: three digits at their smallest fit on the smallest canvas in most arrangements.
    """
    while True:
        inks: list[np.ndarray] = []
        boxes: list[tuple[int, int, int, int]] = []
        for row in rows:
            ink = _render(rng, split, row)
            corners = _free_corners(boxes, ink.shape, size)
            if not corners.size:
                break
            top, left = divmod(int(rng.choice(corners)), size[1])
            inks.append(ink)
            boxes.append((top, left, top + ink.shape[0], left + ink.shape[1]))
        if len(boxes) == len(rows):
            return inks, boxes


def _free_corners(
    boxes: list[tuple[int, int, int, int]], shape: tuple[int, ...], size: Size
) -> Int[np.ndarray, " n"]:
    """Return every pixel, counted row by row, where the top left corner of `shape` can be."""
    height, width = shape
    free = np.zeros(size, bool)
    free[: max(size[0] - height + 1, 0), : max(size[1] - width + 1, 0)] = True
    for top, left, bottom, right in boxes:
        rows = slice(max(top - GAP_PX - height + 1, 0), bottom + GAP_PX)
        free[rows, max(left - GAP_PX - width + 1, 0) : right + GAP_PX] = False
    return np.flatnonzero(free)


def _render(rng: np.random.Generator, split: str, row: int) -> Float32[np.ndarray, "_ _"]:
    """Return the ink (0..1) of one digit at a drawn size and rotation, cut to its box."""
    scale = rng.uniform(MIN_DIGIT_PX, MAX_DIGIT_PX) / IMAGE_SIZE
    angle = math.radians(rng.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG))
    side = math.ceil(IMAGE_SIZE * scale * math.sqrt(2))  # room for any rotation
    a, b = math.cos(angle) / scale, -math.sin(angle) / scale
    middle = side / 2
    x0 = IMAGE_SIZE / 2 - (a + b) * middle
    y0 = IMAGE_SIZE / 2 - (a - b) * middle
    # Pillow wants the way back: for each pixel of the result, where it comes from.
    turned = _load_pictures(split)[row].transform(
        (side, side),
        Image.Transform.AFFINE,
        (a, b, x0, -b, a, y0),
        resample=Image.Resampling.BICUBIC,
    )
    ink = np.asarray(turned) - np.float32(_PAPER)
    ink /= np.float32(_FULL - _PAPER)
    np.clip(ink, 0, 1, out=ink)
    # What would round to nothing in every colour is no ink.
    there = ink >= 1 / 255
    lines, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
    return ink[lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1]


@functools.cache
def _load_scans(split: str) -> tuple[Float32[np.ndarray, "b 32 32"], Int32[np.ndarray, " b"]]:
    """Return the ink (0..1) and the labels of the split's digits."""
    images, labels = digits_arrays(split)
    return images[..., 0].astype(np.float32) / 255, labels


@functools.cache
def _load_pictures(split: str) -> list[Image.Image]:
    return [Image.fromarray(scan) for scan in _load_scans(split)[0]]


@functools.cache
def _rows_by_digit(split: str) -> list[Int[np.ndarray, " n"]]:
    return [np.flatnonzero(_load_scans(split)[1] == digit) for digit in range(10)]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the canvases; allowed: {SPLITS}")


def _check_size(size: Size) -> None:
    if len(size) != 2 or any(
        side % SIZE_MULTIPLE or not MIN_SIZE <= side <= MAX_SIZE for side in size
    ):
        raise ValueError(
            f"canvas size {size}; allowed: height and width that are multiples of {SIZE_MULTIPLE} "
            f"from {MIN_SIZE} to {MAX_SIZE}, such as {SIZES[1]}"
        )
