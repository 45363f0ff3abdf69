"""Whether the digits of rebuilt canvases are still readable and still have their colours.

Every digit is cut out by its box and brought to 16×16 pixels. Last stage of the canvas tokenizer's
run; takes arrays only.
"""

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image
from sklearn.svm import SVC

SIDE = 16

Crops = Float32[np.ndarray, "n 16 16 3"]


def cut_digit(
    image: UInt8[np.ndarray, "H W 3"], box: tuple[int, int, int, int]
) -> Float32[np.ndarray, "16 16 3"]:
    """Cut out a box (top, left, bottom, right; half-open), centred in a black square of 16×16.

    Resized without distortion; where that makes it smaller, averaged.

    Raises:
      ValueError: the box is empty or reaches over the image's edge.
    """
    top, left, bottom, right = box
    if not (0 <= top < bottom <= image.shape[0] and 0 <= left < right <= image.shape[1]):
        raise ValueError(
            f"box {box} (top, left, bottom, right) is empty or outside of the image of "
            f"{image.shape[0]}x{image.shape[1]} pixels"
        )
    height, width = bottom - top, right - left
    side = max(height, width)
    square = np.zeros((side, side, 3), np.uint8)
    down, across = (side - height) // 2, (side - width) // 2
    square[down : down + height, across : across + width] = image[top:bottom, left:right]
    channels = [
        Image.fromarray(square[..., c].astype(np.float32)).resize(
            (SIDE, SIDE), Image.Resampling.BILINEAR
        )
        for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 255)


def canvases_report(
    rebuilt: np.ndarray | Array,
    originals: np.ndarray | Array,
    digits: np.ndarray | Array,
    colours: np.ndarray | Array,
    *,
    palette: np.ndarray | Array,
    train: tuple[np.ndarray | Array, np.ndarray | Array],
) -> dict[str, float]:
    """Judge digits cut out of rebuilt canvases against the same of the originals.

    Args:
      rebuilt, originals: crops [n 16 16 3] of `cut_digit`, of the same digits in the same order.
      digits: int [n], which digit each is.
      colours: int [n], the row of `palette` it was drawn with.
      palette: RGB [k 3] of the colours' full ink, each with 255 in its largest channel.
      train: crops and digits of other originals, to fit the reader on.

    Returns:
      `svm_accuracy`: share of the originals that an SVM fitted on `train` reads right.
      `agreement`: the same share of the rebuilt.
      `colour_agreement`: share of the rebuilt whose colour is nearest to the one they have.
      `colour_error_deg`: mean angle in degrees between the two as RGB vectors.

    Raises:
      ValueError: shapes or numbers do not fit, there are no digits, or a colour has no row.
    """
    known, known_digits = _as_crops("train", train[0]), np.asarray(train[1])
    sets = {
        "rebuilt": _as_crops("rebuilt", rebuilt),
        "originals": _as_crops("originals", originals),
    }
    digits, colours = np.asarray(digits), np.asarray(colours)
    palette = np.asarray(palette, np.float64)
    _check_lengths("train", known, digits=known_digits)
    for name, crops in sets.items():
        _check_lengths(name, crops, digits=digits, colours=colours)
    if colours.min() < 0 or colours.max() >= len(palette):
        raise ValueError(
            f"colours are {colours.min()}..{colours.max()}; allowed: rows of the palette, "
            f"0..{len(palette) - 1}"
        )
    svm = SVC().fit(_read_ink(known), known_digits)
    right, angles = _compare_colours(sets["rebuilt"], colours, palette)
    return {
        "svm_accuracy": float(np.mean(svm.predict(_read_ink(sets["originals"])) == digits)),
        "agreement": float(np.mean(svm.predict(_read_ink(sets["rebuilt"])) == digits)),
        "colour_agreement": float(np.mean(right)),
        "colour_error_deg": float(np.mean(angles)),
    }


def _read_ink(crops: Crops) -> Float[np.ndarray, "n 256"]:
    """Return how much ink is where, 0..1, whatever its colour."""
    return crops.max(-1).reshape(len(crops), -1) / 255


def _compare_colours(
    crops: Crops, colours: np.ndarray, palette: Float[np.ndarray, "k 3"]
) -> tuple[Bool[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Tell whose colour is nearest to its own, and the angles to it; a black crop has none."""
    ink = crops.max(-1, keepdims=True).astype(np.float64)
    found = (crops * ink).sum((1, 2))  # thin edges, where the least error turns the hue, count less
    lengths = np.linalg.norm(found, axis=-1, keepdims=True)
    directions = palette / np.linalg.norm(palette, axis=-1, keepdims=True)
    cosines = found / np.maximum(lengths, 1e-9) @ directions.T
    own = cosines[np.arange(len(colours)), colours]
    right = (cosines.argmax(-1) == colours) & (lengths[:, 0] > 0)
    return right, np.degrees(np.arccos(own.clip(-1, 1)))


def _as_crops(name: str, crops: np.ndarray | Array) -> Crops:
    crops = np.asarray(crops, np.float32)
    if crops.ndim != 4 or crops.shape[1:] != (SIDE, SIDE, 3) or not len(crops):
        raise ValueError(
            f"{name}: crops have shape {crops.shape}; expected [n {SIDE} {SIDE} 3], at least one, "
            "as cut_digit gives them"
        )
    if not (crops.min() >= 0 and crops.max() <= 255):  # so that NaN is refused too
        raise ValueError(f"{name}: pixels {crops.min()}..{crops.max()}; allowed 0..255")
    return crops


def _check_lengths(name: str, crops: np.ndarray, **numbers: np.ndarray) -> None:
    for what, values in numbers.items():
        if values.shape != (len(crops),) or values.dtype.kind not in "iu":
            raise ValueError(
                f"{name}: {what} have shape {values.shape} and dtype {values.dtype}; expected one "
                f"integer for each of the {len(crops)} crops"
            )
