import numpy as np
import pytest

from maskgil_jax.evals import textures

SIDE = 16


def waves(amplitudes, seed=0, count=3):
    """Images of one random-phase wave per frequency along a row, of known power."""
    rng = np.random.default_rng(seed)
    x = np.arange(SIDE) / SIDE
    images = np.zeros((count, SIDE, SIDE, 1))
    for frequency, amplitude in amplitudes.items():
        phases = rng.uniform(0, 2 * np.pi, (count, 1, 1, 1))
        images += amplitude * np.sin(2 * np.pi * frequency * x[None, None, :, None] + phases)
    return images


def test_power_stands_at_the_frequency_of_a_wave():
    power = textures.radial_power(waves({3: 2.0, 6: 1.0}))
    assert len(power) == SIDE // 2 + 1
    assert sorted(np.argsort(power)[-2:]) == [3, 6]
    assert power[3] / power[6] == pytest.approx(
        4 * ring(6) / ring(3)
    )  # averaged over its ring of frequencies
    assert np.delete(power, [3, 6]).max() < 1e-20


def ring(radius):
    f = np.fft.fftfreq(SIDE, 1 / SIDE)
    return np.sum(np.rint(np.hypot(f[:, None], f[None, :])) == radius)


def test_white_noise_has_the_same_power_at_all_frequencies():
    noise = np.random.default_rng(0).standard_normal((400, SIDE, SIDE, 3))
    np.testing.assert_allclose(textures.radial_power(noise), 1.0, atol=0.1)


def test_only_what_is_above_half_of_nyquist_counts():
    real = waves({2: 5.0, 6: 1.0})
    # 4 is half of Nyquist itself.
    for changed in ({2: 1.0, 6: 1.0}, {2: 5.0, 4: 3.0, 6: 1.0}):
        assert textures.high_frequency_ratio(waves(changed), real) == pytest.approx(1.0)
    halved = textures.high_frequency_ratio(waves({2: 5.0, 6: 0.5}), real)
    assert halved == pytest.approx(0.25)
    assert textures.high_frequency_ratio(waves({5: 1.0}), waves({5: 2.0})) == pytest.approx(0.25)


def test_patches_of_smoothed_images_are_further_away_than_of_new_ones():
    noise = np.random.default_rng(0).standard_normal((2, 40, SIDE, SIDE, 1))
    smooth = (noise[0] + np.roll(noise[0], 1, axis=1)) / np.sqrt(2)
    settings = {"patch": 4, "count": 2000}
    new = textures.patch_frechet(noise[1], noise[0], **settings)
    assert textures.patch_frechet(noise[0], noise[0], **settings) == pytest.approx(0, abs=1e-8)
    assert textures.patch_frechet(smooth, noise[0], **settings) > 10 * new
    assert textures.patch_frechet(noise[1], noise[0], seed=0, **settings) == new
    assert textures.patch_frechet(noise[1], noise[0], seed=1, **settings) != new


def test_patches_come_from_everywhere():
    images = np.arange(2 * 6 * 6).reshape(2, 6, 6, 1)
    patches = textures._draw_patches("images", images, 3, 5000, 0)
    assert patches.shape == (5000, 9)
    assert np.unique(patches[:, 0]).size == 2 * 4 * 4
    np.testing.assert_array_equal(patches[:, 3] - patches[:, 0], 6)
    np.testing.assert_array_equal(patches[:, 1] - patches[:, 0], 1)


def test_what_cannot_be_measured_is_named():
    images = np.zeros((4, 8, 8, 1))
    for call, message in (
        (lambda: textures.radial_power(images[..., 0]), r"shape \(4, 8, 8\)"),
        (lambda: textures.radial_power(images[:, :4]), "need square ones"),
        (lambda: textures.radial_power(images[:0]), "non-empty"),
        (lambda: textures.radial_power(images * np.nan), "hold NaN or infinity"),
        (lambda: textures.high_frequency_power(images[:, :2, :2]), "give at least 4"),
        (lambda: textures.high_frequency_ratio(images, images), "are flat"),
        (lambda: textures.high_frequency_ratio(images, images[:, :4, :4]), "give the same"),
        (lambda: textures.patch_frechet(images, images, patch=9), "patch 9 does not fit"),
        (lambda: textures.patch_frechet(images, images, patch=4, count=16), "more than 16"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
