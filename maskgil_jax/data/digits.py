"""The embedded dataset: scikit-learn's 1,797 real handwritten digits as 32×32 RGB images.

Start of the training path when nothing has been downloaded; the held-out part is what
`evals.digits` compares samples with.
"""

import functools
import operator
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float, Int32, UInt8
from PIL import Image
from sklearn.datasets import load_digits

SPLITS = ("train", "test")
IMAGE_SIZE = 32
NUM_CLASSES = 10
NUM_TRAIN = 1500
SPLIT_SEED = 0
MAX_INK = 16  # scikit-learn stores the ink of each of the 8x8 cells as 0..16


def digits_arrays(split: str) -> tuple[UInt8[np.ndarray, "b 32 32 3"], Int32[np.ndarray, " b"]]:
    """Return the images (0..255) and labels (0..9) of one split, in a fixed order, read-only.

    The split is a permutation drawn with seed 0: the first 1,500 digits of it are "train", the
    other 297 "test".

    Raises:
      ValueError: `split` is not one of the two.
    """
    _check_split(split)
    images, labels = _load_all()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    chosen = order[:NUM_TRAIN] if split == "train" else order[NUM_TRAIN:]
    images, labels = images[chosen], labels[chosen]
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


class DigitsSource:
    """Give the digits of one split as `{"image": uint8 [32 32 3], "label": int32 []}` records.

    Raises:
      ValueError: `split` is not "train" or "test".
    """

    num_classes = NUM_CLASSES

    def __init__(self, split: str = "train"):
        self._images, self._labels = digits_arrays(split)
        self.split = split
        self.name = f"digits/{split}"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        row = operator.index(index)
        return {"image": self._images[row], "label": np.asarray(self._labels[row])}

    def __repr__(self) -> str:
        return f"DigitsSource(split={self.split!r})"


@functools.cache
def _load_all() -> tuple[np.ndarray, np.ndarray]:
    """Read and enlarge all 1,797 digits in scikit-learn's order."""
    digits = load_digits()
    images = np.stack([_enlarge(ink) for ink in digits.images])
    return images, digits.target.astype(np.int32)


def _enlarge(ink: Float[np.ndarray, "8 8"]) -> UInt8[np.ndarray, "32 32 3"]:
    """Turn ink 0..16 into a 32×32 RGB image, bicubic.

    Resized as floats: on bytes the overshoot of the bicubic kernel would be clipped in between the
    two passes, and 16 levels of ink do not fall on whole bytes.
    """
    small = Image.fromarray((ink * (255 / MAX_INK)).astype(np.float32))
    grey = np.asarray(small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    return np.repeat(np.rint(grey.clip(0, 255)).astype(np.uint8)[..., None], 3, axis=-1)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the digits; allowed: {SPLITS}")
