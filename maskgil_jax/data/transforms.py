"""Record → record, between a source and its batches: crop, flip, shake, scale.

Each transform is called with a record and a `numpy.random.Generator` that belongs to that record
alone, draws the same numbers from it whatever the image, and leaves the given record untouched.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

Record = dict[str, Any]
Transform = Callable[[Record, np.random.Generator], Record]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """Apply transforms one after the other."""

    transforms: tuple[Transform, ...]

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Apply all of them."""
        for transform in self.transforms:
            record = transform(record, rng)
        return record


@dataclasses.dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """Make the image as small as covers `size`, and crop the middle.

    `size` in pixels is the side of a square, or height and width.

    Raises:
      ValueError: `size` is not positive.
    """

    size: int | tuple[int, int]

    def __post_init__(self):
        _as_sides(self.size)

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Crop the image."""
        return record | {"image": center_crop(record["image"], self.size)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizedRandomCrop:
    """Make the image a little larger than covers `size`, and cut a random window of `size`.

    `size` in pixels is the side of a square, or height and width. The window holds between
    `min_share` and all of what fits into the image along its tighter side, drawn uniformly by the
    pixel.

    Raises:
      ValueError: `size` is not positive, or `min_share` is not in (0, 1].

    Reference: openai/guided-diffusion, guided_diffusion/image_datasets.py (random_crop_arr), with
    which LlamaGen's tokenizers were trained.
    """

    size: int | tuple[int, int]
    min_share: float = 0.8

    def __post_init__(self):
        _as_sides(self.size)
        if not 0 < self.min_share <= 1:
            raise ValueError(f"min_share = {self.min_share}; allowed: more than 0, at most 1")

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Draw size and place, and crop the image."""
        sides = _as_sides(self.size)
        longer = max(sides)
        drawn = int(rng.integers(longer, math.ceil(longer / self.min_share) + 1))
        height, width = (round(side * drawn / longer) for side in sides)
        resized = record | {"image": resize_to_cover(record["image"], (height, width))}
        return RandomCrop(size=sides)(resized, rng)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """Cut a window of `size` (height, width) pixels at a uniform place, without resizing.

    Raises:
      ValueError: a side of `size` is not positive; when called, the image is smaller.
    """

    size: tuple[int, int]

    def __post_init__(self):
        if min(self.size) < 1:
            raise ValueError(f"size = {self.size}; give at least 1 pixel per side")

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Draw the place and crop the image."""
        image = record["image"]
        height, width = self.size
        room = image.shape[0] - height, image.shape[1] - width
        if min(room) < 0:
            raise ValueError(
                f"image of {image.shape[0]}x{image.shape[1]} pixels is smaller than the crop "
                f"{height}x{width}; give a smaller size"
            )
        # `integers` would take more numbers from the generator for some images than for others.
        top, left = (int(u * (space + 1)) for u, space in zip(rng.random(2), room, strict=True))
        return record | {"image": image[top : top + height, left : left + width]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomFlip:
    """Mirror the image left to right with the given probability.

    Raises:
      ValueError: `probability` is not in [0, 1].
    """

    probability: float = 0.5

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability = {self.probability}; allowed 0..1")

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Draw once, and flip or not."""
        flip = rng.random() < self.probability
        return record | {"image": record["image"][:, ::-1]} if flip else record


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomAffine:
    """Shift, turn and scale the image about its centre, all drawn uniformly; bicubic.

    `max_shift_px` in pixels along each axis, `max_rotation_deg` in degrees to either side,
    `scale_range` as factors; what comes into view from outside is `fill` (0..255).

    Raises:
      ValueError: a bound is negative, the scales are not positive and ascending, or `fill` is
        outside 0..255.
    """

    max_shift_px: float = 0.0
    max_rotation_deg: float = 0.0
    scale_range: tuple[float, float] = (1.0, 1.0)
    fill: int = 0

    def __post_init__(self):
        for name in ("max_shift_px", "max_rotation_deg"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}; give 0 or more")
        low, high = self.scale_range
        if not 0 < low <= high < math.inf:
            raise ValueError(f"scale_range = {self.scale_range}; expected 0 < low <= high")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"fill = {self.fill}; allowed 0..255")

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Draw shift, rotation and scale, and warp the image."""
        down, right = rng.uniform(-self.max_shift_px, self.max_shift_px, size=2)
        rotation = rng.uniform(-self.max_rotation_deg, self.max_rotation_deg)
        scale = rng.uniform(*self.scale_range)
        image = warp_affine(
            record["image"],
            shift_px=(float(down), float(right)),
            rotation_deg=rotation,
            scale=scale,
            fill=self.fill,
        )
        return record | {"image": image}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PickCrop:
    """Take one of the stored crops of tokens [crops gh gw], each with the same probability."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Draw once, and take that crop."""
        tokens = record["tokens"]
        return record | {"tokens": tokens[rng.integers(len(tokens))]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadCaption:
    """Turn the text `caption` into ids, `caption` int32 [s] and `caption_length` int32 [].

    Attributes:
      tokenize: texts to ids [b s], padded to one length, and lengths [b], the first two of a tuple.
    """

    tokenize: Callable[[Sequence[str]], tuple[np.ndarray, ...]]

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Read the caption."""
        ids, lengths, *_ = self.tokenize([record["caption"]])
        return record | {"caption": ids[0], "caption_length": lengths[0]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PickCaption:
    """Take one of the texts of an image, each with the same probability.

    `caption` is a text, which is left as it is, or an array of several.
    """

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Draw once, whatever the number of texts, and take that one."""
        texts = np.atleast_1d(record["caption"])
        return record | {"caption": str(texts[int(rng.random() * len(texts))])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PickFeatures:
    """Take the stored features of one text of an image, each with the same probability.

    Of `features`, an array [s t] for every text, one becomes `caption` [length t], zero where
    padded, with `caption_length` int32 []. The text drawn is the one that `PickCaption` draws.

    Attributes:
      length: to which they are padded; no text has more tokens.
    """

    length: int

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Draw once, whatever the number of texts, and take the features of that one."""
        features = record["features"]
        chosen = features[int(rng.random() * len(features))]
        padded = np.zeros((self.length, chosen.shape[1]), chosen.dtype)
        padded[: len(chosen)] = chosen
        rest = {name: value for name, value in record.items() if name != "features"}
        return rest | {"caption": padded, "caption_length": np.asarray(len(chosen), np.int32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToFloat:
    """Turn uint8 pixels 0..255 into float32 in [-1, 1]."""

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Convert the image."""
        return record | {"image": to_float(record["image"])}


def center_crop(
    image: UInt8[np.ndarray, "H W 3"], size: int | tuple[int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """Return the largest central window of the shape of `size`, resized to `size` pixels.

    `size` is the side of a square, or height and width.

    Reference: openai/guided-diffusion, guided_diffusion/image_datasets.py (center_crop_arr).
    """
    height, width = _as_sides(size)
    pixels = resize_to_cover(image, (height, width))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def resize_to_cover(
    image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """Resize so that `size` (height, width) just fits into the image, whose shape is kept.

    Halved by 2×2 boxes while it is at least twice as large as that, then bicubic: as the images of
    the ImageNet reference statistics.
    """
    height, width = size
    picture = Image.fromarray(image)
    while picture.width >= 2 * width and picture.height >= 2 * height:
        halved = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halved, Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    scaled = (
        max(width, round(picture.width * scale)),
        max(height, round(picture.height * scale)),
    )
    return np.asarray(picture.resize(scaled, Image.Resampling.BICUBIC))


def _as_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size = {size}; give at least 1 pixel")
    return height, width


def warp_affine(
    image: UInt8[np.ndarray, "H W 3"],
    *,
    shift_px: tuple[float, float],
    rotation_deg: float,
    scale: float,
    fill: int,
) -> UInt8[np.ndarray, "H W 3"]:
    """Scale and turn an image (counter-clockwise) about its centre, then shift it (down, right)."""
    height, width, _ = image.shape
    angle = math.radians(rotation_deg)
    # Pillow wants the way back: for each pixel of the result, where it comes from.
    a, b = math.cos(angle) / scale, -math.sin(angle) / scale
    x, y = width / 2 + shift_px[1], height / 2 + shift_px[0]
    matrix = (a, b, width / 2 - a * x - b * y, -b, a, height / 2 + b * x - a * y)
    warped = Image.fromarray(image).transform(
        (width, height),
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=(fill,) * 3,
    )
    return np.asarray(warped)


def to_float(image: UInt8[np.ndarray, "*b H W c"]) -> Float32[np.ndarray, "*b H W c"]:
    """Map pixels 0..255 to float32 in [-1, 1]: x / 127.5 - 1."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)
