"""Fine texture of images against that of real ones: the power spectrum, and patches.

A tokenizer trained on squared error alone gives back too little detail. Both measures see that
where pixel errors do not: neither compares an image with its own original.

Reference: Durall et al. 2020, "Watch your Up-Convolution" (azimuthal averages of the spectrum);
Heusel et al. 2017, equation 6 (Fréchet distance of two Gaussians).
"""

import numpy as np
from jax import Array
from jaxtyping import Float

from maskgil_jax.evals.frechet import Statistics, frechet_distance


def radial_power(images: Array | np.ndarray) -> Float[np.ndarray, " r"]:
    """Return the mean power of images [b H W c] at radial frequencies 0, 1, … per image height.

    Power is the squared magnitude of the 2D Fourier transform (divided by H·W), averaged over
    images, channels and all frequencies whose radius rounds to the same whole number, up to the
    Nyquist frequency, side / 2. Sides are equal; values are of any one scale.

    Raises:
        ValueError: not [b H H c], empty, or with values that are not finite.
    """
    images = _as_images("images", images)
    side = images.shape[1]
    if images.shape[2] != side:
        raise ValueError(f"images have shape {images.shape}; radial frequencies need square ones")
    spectrum = np.fft.fft2(images, axes=(1, 2), norm="ortho")
    power = np.mean(np.abs(spectrum) ** 2, axis=(0, 3))
    frequencies = np.fft.fftfreq(side, 1 / side)
    radius = np.rint(np.hypot(frequencies[:, None], frequencies[None, :])).astype(int)
    sums, counts = (np.bincount(radius.ravel(), w) for w in (power.ravel(), None))
    return (sums / counts)[: side // 2 + 1]


def high_frequency_power(images: Array | np.ndarray) -> float:
    """Return the mean of the radially averaged power above half the Nyquist frequency.

    Every radius counts alike, however many frequencies it has.

    Raises:
        ValueError: as `radial_power`, or sides below 4 pixels, which have no such frequency.
    """
    power = radial_power(images)
    nyquist = len(power) - 1
    if nyquist < 2:
        raise ValueError(f"images of {np.shape(images)[1]} pixels are too small; give at least 4")
    return float(np.mean(power[nyquist // 2 + 1 :]))


def high_frequency_ratio(images: Array | np.ndarray, real: Array | np.ndarray) -> float:
    """Return that power of images over that of real ones: below 1 too smooth, above 1 too rough.

    Raises:
        ValueError: as `high_frequency_power`, shapes that differ, or real images without any.
    """
    _check_same_shape(images, real)
    ours, theirs = high_frequency_power(images), high_frequency_power(real)
    if theirs == 0:
        raise ValueError("the real images are flat: there is no power to compare with")
    return ours / theirs


def patch_frechet(
    images: Array | np.ndarray,
    real: Array | np.ndarray,
    *,
    patch: int = 8,
    count: int = 10_000,
    seed: int = 0,
) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to random patches of two sets.

    The same places of the same images are cut from both sets if these have equally many images.

    Args:
        images: [b H W c].
        real: [n H W c], on the same scale.
        patch: side of a patch in pixels.
        count: patches drawn from each set, with replacement; more than the patch·patch·c values of
            a patch.
        seed: of the draw.

    Raises:
        ValueError: arrays that are no images or differ in shape, a patch that does not fit, or too
            few patches for a covariance.
    """
    _check_same_shape(images, real)
    one, other = (
        _draw_patches(name, values, patch, count, seed)
        for name, values in (("images", images), ("real", real))
    )
    return frechet_distance(Statistics.of_features(one), Statistics.of_features(other))


def _draw_patches(
    name: str, images: Array | np.ndarray, patch: int, count: int, seed: int
) -> Float[np.ndarray, "n d"]:
    images = _as_images(name, images)
    b, height, width, channels = images.shape
    if not 1 <= patch <= min(height, width):
        raise ValueError(f"patch {patch} does not fit images of {height}×{width} pixels")
    if count <= patch * patch * channels:
        raise ValueError(
            f"count {count} is too few for a covariance of patches of {patch}×{patch}×{channels} "
            f"values; give more than {patch * patch * channels}"
        )
    rng = np.random.default_rng(seed)
    # Shares rather than indices: sets of different sizes see the same places as far as they go.
    share, down, right = rng.random((3, count))
    windows = np.lib.stride_tricks.sliding_window_view(images, (patch, patch), axis=(1, 2))
    rows, columns = height - patch + 1, width - patch + 1
    picked = windows[
        (share * b).astype(int), (down * rows).astype(int), (right * columns).astype(int)
    ]
    return picked.reshape(count, -1)


def _as_images(name: str, images: Array | np.ndarray) -> Float[np.ndarray, "b H W c"]:
    images = np.asarray(images)
    if images.ndim != 4 or 0 in images.shape or images.dtype.kind not in "fiu":
        raise ValueError(
            f"{name} have shape {images.shape} and dtype {images.dtype}; expected a non-empty "
            "[b, height, width, channels] array of real numbers"
        )
    images = images.astype(np.float64)
    if not np.isfinite(images).all():
        raise ValueError(f"{name} hold NaN or infinity")
    return images


def _check_same_shape(images: Array | np.ndarray, real: Array | np.ndarray) -> None:
    if np.shape(images)[1:] != np.shape(real)[1:]:
        raise ValueError(
            f"images have shape {np.shape(images)}, real ones {np.shape(real)}; give the same "
            "height, width and channels"
        )
