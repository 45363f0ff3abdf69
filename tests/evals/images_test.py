import math

import numpy as np
import pytest

from maskgil_jax.evals.images import psnr, ssim


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def shake(images, amount, seed=1):
    step = np.random.default_rng(seed).integers(-amount, amount + 1, images.shape)
    return np.clip(images + step, 0, 255).astype(np.uint8)


def slow_ssim(x, y):
    """The definition, window by window: a two-dimensional Gaussian, weighted moments."""
    window = np.array(
        [[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)]
    )
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(x.shape[-1]):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                a, b = (
                    z[top : top + 11, left : left + 11, channel].astype(np.float64) for z in (x, y)
                )
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a = (window * (a - mean_a) ** 2).sum()
                var_b = (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                values.append(
                    (2 * mean_a * mean_b + c1)
                    * (2 * covariance + c2)
                    / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                )
    return np.mean(values)


def test_psnr_follows_its_formula():
    images, others = noise(3, 8, 6, 3), noise(3, 8, 6, 3, seed=1)
    expected = [
        20 * math.log10(255 / math.sqrt(((a.astype(float) - b.astype(float)) ** 2).mean()))
        for a, b in zip(images, others, strict=True)
    ]
    np.testing.assert_allclose(psnr(images, others), expected, rtol=1e-12)
    # A difference of one everywhere, whichever is larger: uint8 must not wrap around.
    low = np.full((1, 4, 4, 1), 7, np.uint8)
    for high in (low + 1, low - 1):
        assert psnr(low, high) == pytest.approx(20 * math.log10(255))
    assert psnr(low * 0, low * 0 + 255) == pytest.approx(0)


def test_equal_images_are_infinitely_near():
    images = noise(2, 12, 12, 3)
    assert np.isposinf(psnr(images, images)).all()
    np.testing.assert_allclose(ssim(images, images), 1, rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 11, 11, 1), (2, 16, 13, 3)])
def test_ssim_is_its_definition(shape):
    images = noise(*shape)
    images[1] = np.linspace(0, 255, images[1].size).reshape(shape[1:]).astype(np.uint8)
    for others in (noise(*shape, seed=1), shake(images, 20), images[:, ::-1]):
        expected = [slow_ssim(x, y) for x, y in zip(images, others, strict=True)]
        np.testing.assert_allclose(ssim(images, others), expected, rtol=1e-9, atol=1e-12)


def test_both_fall_with_the_noise_and_are_symmetric():
    images = noise(1, 32, 32, 3)
    for measure in (psnr, ssim):
        values = [measure(images, shake(images, amount))[0] for amount in (2, 10, 50)]
        assert values == sorted(values, reverse=True)
        other = shake(images, 10)
        np.testing.assert_allclose(measure(images, other), measure(other, images), rtol=1e-12)


def test_each_pair_is_measured_alone():
    images, others = noise(3, 12, 14, 3), shake(noise(3, 12, 14, 3), 30)
    for measure in (psnr, ssim):
        alone = [measure(images[i : i + 1], others[i : i + 1])[0] for i in range(3)]
        np.testing.assert_array_equal(measure(images, others), alone)


@pytest.mark.parametrize(
    ("measure", "images", "others", "message"),
    [
        (psnr, noise(1, 4, 4, 3) / 255, noise(1, 4, 4, 3), "images are float64; expected uint8"),
        (psnr, noise(4, 4, 3), noise(4, 4, 3), r"shape \(4, 4, 3\); expected \[b H W c\]"),
        (psnr, noise(0, 4, 4, 3), noise(0, 4, 4, 3), "not empty"),
        (psnr, noise(1, 4, 4, 3), noise(1, 4, 5, 3), "differ; give pairs"),
        (ssim, noise(1, 10, 20, 3), noise(1, 10, 20, 3), "with sides of at least 11"),
        (ssim, noise(1, 12, 12, 3), noise(2, 12, 12, 3), "differ; give pairs"),
    ],
)
def test_wrong_images_are_refused(measure, images, others, message):
    with pytest.raises(ValueError, match=message):
        measure(images, others)
