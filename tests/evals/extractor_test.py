"""Features do not depend on how images are batched or spread, and come in bounded memory."""

import dataclasses

import jax
import numpy as np
import pytest

from maskgil_jax import sharding
from maskgil_jax.evals.extractor import FeatureExtractor, check_pixels
from maskgil_jax.evals.inception import FEATURES, Inception, InceptionConfig

CONFIG = InceptionConfig(channels=2, num_logits=5)
EARLY = ("64",)  # a short program


@pytest.fixture(scope="module")
def inception():
    module, images = CONFIG.make_module(), np.zeros((1, 299, 299, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        if leaf.ndim > 1:
            return values * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        return np.abs(values) + 0.5 if path[-1].key in ("scale", "var") else values / 5

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return Inception(config=CONFIG, params=params, sha256="0", fingerprint="0")


@pytest.fixture(scope="module")
def images():
    tiles = np.random.default_rng(1).integers(0, 256, (7, 3, 4, 3), dtype=np.uint8)
    brightness = np.linspace(0, 1, 7)[:, None, None, None]
    return (tiles * brightness).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)


def make_mesh(count):
    return sharding.make_mesh({"data": -1}, jax.devices()[:count])


def test_devices_and_batches_change_rounding_only(inception, images, quick_compilation):
    one = FeatureExtractor(inception, features=FEATURES, batch_size=3, mesh=make_mesh(1))(images)
    four = FeatureExtractor(inception, features=FEATURES, mesh=make_mesh(4))
    assert four.batch_size == 16
    found = four(iter([images[:2], images[2:]]))
    for name, width in CONFIG.widths().items():
        assert one[name].shape == (7, width)
        assert one[name].dtype == np.float32
        scale = np.abs(one[name]).max()
        assert np.ptp(one[name], axis=0).max() > 0.1 * scale
        np.testing.assert_allclose(found[name], one[name], atol=1e-5 * scale, rtol=0)


def test_images_of_several_sizes_stay_in_order(inception, images, quick_compilation):
    extract = FeatureExtractor(inception, features=EARLY, batch_size=4, mesh=make_mesh(2))
    small = images[:, :9, :8]
    parts = [images[:3], images[3:3], small[:6], small[6:], images[3:]]
    found = extract(parts)["64"]
    expected = np.concatenate([extract(part)["64"] for part in (images[:3], small, images[3:])])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert set(extract(images)) == set(EARLY)


def test_no_more_than_three_batches_are_held(inception, images, quick_compilation):
    taken = 0

    def give():
        nonlocal taken
        for i in range(40):
            taken += 1
            yield images[i % 7][None]

    extract = FeatureExtractor(inception, features=EARLY, batch_size=4, mesh=make_mesh(1))
    counts = []
    for part in extract.stream(give()):
        counts.append(len(part["64"]))
        assert taken <= sum(counts) + 2 * 4
    assert counts == [4] * 10


def test_damaged_weights_are_noticed(inception, images, quick_compilation):
    params = dict(inception.params)
    params["Conv2d_2a_3x3"] = {**params["Conv2d_2a_3x3"], "bias": np.full(2, np.nan, np.float32)}
    broken = dataclasses.replace(inception, params=params)
    with pytest.raises(ValueError, match="feature '64' of image 0 is not finite"):
        FeatureExtractor(broken, features=EARLY, batch_size=4, mesh=make_mesh(1))(images)


def test_published_weights_are_known_by_their_sum(inception):
    assert not inception.is_published
    assert dataclasses.replace(inception, sha256="6726825d0000").is_published


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ("pools",)}, "'pools' is unknown; allowed: 64, .*; did you mean 'pool'"),
        ({"features": ()}, "no feature is asked for"),
        ({"batch_size": 6}, "batch_size 6 is not divisible by 4"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_settings_are_checked(inception, options, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(inception, **options)


def test_no_images_are_refused(inception):
    extract = FeatureExtractor(inception)
    for nothing in ([], iter([]), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="there are no images"):
            extract(nothing)


WRONG = {
    "floats": (np.zeros((2, 4, 4, 3), np.float32), r"are float32; give uint8 .*127.5 x"),
    "nan": (np.full((2, 4, 4, 3), np.nan), "float64; .*hold NaN"),
    "int": (np.zeros((2, 4, 4, 3), np.int32), "are int32; give uint8 pixels 0 to 255$"),
    "single": (np.zeros((4, 4, 3), np.uint8), r"image\[None\]"),
    "flat": (np.zeros((4, 48), np.uint8), r"expected \[b H W 3\]$"),
    "grey": (np.zeros((2, 4, 4, 1), np.uint8), "these are grey"),
    "grey and alpha": (np.zeros((2, 4, 4, 2), np.uint8), "grey with alpha"),
    "alpha": (np.zeros((2, 4, 4, 4), np.uint8), "these have alpha, or are CMYK"),
    "first": (np.zeros((2, 3, 8, 8), np.uint8), "channels come first: transpose"),
    "many": (np.zeros((2, 8, 8, 8), np.uint8), "give RGB in the last axis"),
    "empty": (np.zeros((2, 0, 4, 3), np.uint8), "no pixels"),
    "list": ([[1, 2, 3]], "list is no array"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_are_no_pixels_is_refused(inception, case):
    wrong, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        check_pixels(wrong)
    with pytest.raises(ValueError, match="images of batch 1"):
        FeatureExtractor(inception)(iter([np.zeros((1, 8, 8, 3), np.uint8), wrong]))
