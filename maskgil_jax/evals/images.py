"""How near pictures are to others of the same content: PSNR and SSIM.

What a tokenizer is judged by: its reconstructions against the images they were made from.
"""

import numpy as np
from jaxtyping import Float

PEAK = 255.0
WINDOW = 11
SIGMA = 1.5
_C1, _C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def psnr(images: np.ndarray, others: np.ndarray) -> Float[np.ndarray, " b"]:
    """Return the peak signal-to-noise ratio of each pair of uint8 images [b H W c], in dB.

    10·log10(255² / mean squared difference over pixels and channels); infinite for equal images.

    Raises:
      ValueError: not uint8 [b H W c], empty, or of different shapes.
    """
    _check_pair(images, others, side=1)
    values = []
    for one, other in zip(images, others, strict=True):
        error = np.mean(np.square(one.astype(np.float64) - other))
        values.append(np.inf if error == 0 else 10 * np.log10(PEAK**2 / error))
    return np.array(values, np.float64)


def ssim(images: np.ndarray, others: np.ndarray) -> Float[np.ndarray, " b"]:
    """Return the structural similarity of each pair of uint8 images [b H W c], at most 1.

    Local means, variances and covariance under an 11×11 Gaussian window of σ = 1.5, K1 = 0.01,
    K2 = 0.03, data range 255; averaged over channels and over all places where the window lies
    inside the image.

    Raises:
      ValueError: not uint8 [b H W c], empty, a side below 11, or of different shapes.

    Reference: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", section III.
    """
    _check_pair(images, others, side=WINDOW)
    pairs = zip(images, others, strict=True)
    return np.array([_similarity(x.astype(np.float64), y.astype(np.float64)) for x, y in pairs])


def _similarity(x: Float[np.ndarray, "H W c"], y: Float[np.ndarray, "H W c"]) -> float:
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x * mean_x
    variance_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    contrast_structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return float(np.mean(luminance * contrast_structure))


def _blur(x: Float[np.ndarray, "H W c"]) -> np.ndarray:
    """Average under the Gaussian window wherever it lies inside."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        x = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis=axis) @ weights
    return x


def _check_pair(images: np.ndarray, others: np.ndarray, *, side: int) -> None:
    for array in (images, others):
        if array.dtype != np.uint8:
            raise ValueError(f"images are {array.dtype}; expected uint8 pixels, 0..255")
        if array.ndim != 4 or 0 in array.shape or min(array.shape[1:3]) < side:
            raise ValueError(
                f"images have shape {array.shape}; expected [b H W c], not empty, with sides of at "
                f"least {side}"
            )
    if images.shape != others.shape:
        raise ValueError(f"shapes {images.shape} and {others.shape} differ; give pairs of images")
