"""From an image and a pixel mask to tokens to generate anew, and back to pixels.

NumPy in, NumPy out; on the generation path this stands before the decoding loop (which tokens are
unknown) and behind the tokenizer (what is shown of the result).
"""

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage


def check_masks(images: np.ndarray, masks: np.ndarray) -> None:
    """Refuse images and masks that cannot be edited.

    Raises:
        ValueError: images are not uint8 [b H W c], masks not bool [b H W] of the same size, or a
            mask marks nothing or everything.
    """
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype} {images.shape}; give uint8 [b H W c]")
    if masks.dtype != bool or masks.shape != images.shape[:3]:
        raise ValueError(
            f"masks are {masks.dtype} {masks.shape}; images of shape {images.shape} need bool "
            f"{images.shape[:3]}, true where to generate"
        )
    marked = masks.mean((1, 2))
    for index, share in enumerate(marked):
        if share in (0, 1):
            what = "nothing" if share == 0 else "the whole image"
            remedy = "mark what to generate" if share == 0 else "generate it without an image"
            raise ValueError(f"mask {index} marks {what}; {remedy}")


def token_mask(
    masks: Bool[np.ndarray, "b H W"], factor: int, grow: int = 0
) -> Bool[np.ndarray, "b gh gw"]:
    """Mark every token of which a pixel is marked.

    Args:
        masks: true where to generate.
        factor: pixels per token, along each side.
        grow: cells by which the marked part is widened on every side, diagonals included.

    Raises:
        ValueError: if a side is no multiple of the factor, or `grow` is negative.
    """
    b, height, width = masks.shape
    if height % factor or width % factor:
        raise ValueError(
            f"masks of {height}×{width} pixels are not divisible by {factor}, the pixels per token"
        )
    if grow < 0:
        raise ValueError(f"grow {grow} is out of range; allowed: 0 or more cells")
    blocks = masks.reshape(b, height // factor, factor, width // factor, factor)
    cells = np.asarray(blocks.any((2, 4)))
    if not grow:
        return cells
    side = np.ones((1, 3, 3), bool)
    return np.asarray(ndimage.binary_dilation(cells, structure=side, iterations=grow))


def check_feather(feather: float) -> None:
    """Raise a `ValueError` if the width of the transition is negative or not finite."""
    if not (np.isfinite(feather) and feather >= 0):
        raise ValueError(f"feather {feather} is out of range; allowed: 0 or more pixels")


def check_regions(regions: Bool[np.ndarray, "b gh gw"]) -> None:
    """Raise a `ValueError` if nothing of an image's tokens is kept."""
    for index, whole in enumerate(np.asarray(regions.all((1, 2)))):
        if whole:
            raise ValueError(
                f"mask {index} touches every token, so nothing of the image is kept; mark less, "
                "grow less, or generate it without an image"
            )


def composite(
    originals: UInt8[np.ndarray, "b H W c"],
    generated: UInt8[np.ndarray, "b H W c"],
    masks: Bool[np.ndarray, "b H W"],
    feather: float = 0.0,
) -> UInt8[np.ndarray, "b H W c"]:
    """Lay the generated pixels over the originals where the mask is true.

    Outside the mask the generated share falls linearly with the distance to it, to 0 at `feather`
    pixels; inside it is 1.

    Raises:
        ValueError: if `feather` is negative.
    """
    check_feather(feather)
    if not len(originals):
        return originals
    share = np.stack([_shares(mask, feather) for mask in masks])[..., None]
    mixed = share * generated + (1 - share) * originals
    return np.rint(mixed).astype(np.uint8)


def _shares(mask: np.ndarray, feather: float) -> np.ndarray:
    if feather == 0:
        return mask.astype(np.float64)
    distance = ndimage.distance_transform_edt(~mask)
    return np.clip(1 - distance / feather, 0, 1)


def pad(
    images: UInt8[np.ndarray, "b H W c"], padding: tuple[int, int, int, int]
) -> tuple[UInt8[np.ndarray, "b H2 W2 c"], Bool[np.ndarray, "b H2 W2"]]:
    """Add pixels around images, and return masks that mark them.

    The new pixels repeat the edge, so that they do not disturb what the tokenizer sees of it.

    Args:
        images: originals.
        padding: pixels to add at the top, bottom, left and right.

    Raises:
        ValueError: if there are not four, one is negative, or all are 0.
    """
    if len(padding) != 4 or min(padding) < 0 or not any(padding):
        raise ValueError(
            f"padding {tuple(padding)} is out of range; give four numbers of pixels, "
            "at the top, bottom, left and right, 0 or more, not all of them 0"
        )
    top, bottom, left, right = padding
    wide = np.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)), "edge")
    masks = np.ones(wide.shape[:3], bool)
    masks[:, top : top + images.shape[1], left : left + images.shape[2]] = False
    return wide, masks


def draw_kept(
    shape: tuple[int, int, int], keep: float, seed: int, first_index: int = 0
) -> Bool[np.ndarray, "b gh gw"]:
    """Draw which tokens of each image are kept: round(keep · gh·gw) of them, but never all.

    Image i draws from (seed, i), whatever the number of images.

    Args:
        shape: (b, gh, gw).
        keep: share of the tokens, in [0, 1).
        seed: seed of all images.
        first_index: number i of the first image, where this is part of a longer list.

    Raises:
        ValueError: if `keep` is not in [0, 1), the seed not in 0…2³² - 1, or `first_index` is
            negative.
    """
    if not 0 <= keep < 1:
        raise ValueError(f"keep {keep} is out of range; allowed: 0 or more, less than 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is out of range; allowed: 0 to {2**32 - 1}")
    if first_index < 0:
        raise ValueError(f"first_index {first_index} is out of range; allowed: 0 or more")
    count, length = shape[0], shape[1] * shape[2]
    kept = np.zeros((count, length), bool)
    number = min(round(keep * length), length - 1)
    for index, row in enumerate(kept, first_index):
        row[np.random.default_rng((seed, index)).permutation(length)[:number]] = True
    return kept.reshape(shape)
