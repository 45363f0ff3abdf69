"""The net gives what the original gave, from the resizing to the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens_lib import load_golden

from maskgil_jax.convert import export_state_dict, import_state_dict
from maskgil_jax.evals.inception import FEATURES, INPUT_SIDE, InceptionConfig, resize_images

NAMES = {
    "64": "f64",
    "192": "f192",
    "768": "f768",
    "pool": "pool_2048",
    "logits": "logits_unbiased",
    "biased_logits": "logits",
}


def test_every_feature_is_that_of_the_original():
    golden = load_golden("inception_fid")
    config, params = import_state_dict("inception-fid", golden.state_dict)
    assert config == InceptionConfig()

    @jax.jit
    def run(params, images):
        x = resize_images(images)
        return x, config.make_module().apply({"params": params}, x)

    x, features = run(params, golden.arrays["images"])
    resized = np.asarray(x)[:, ::23, ::23] * 128 + 128
    np.testing.assert_allclose(resized, golden.arrays["resized_every_23"], atol=1e-4, rtol=0)
    assert set(features) == set(FEATURES) == {*NAMES, "spatial"}
    for name, stored in NAMES.items():
        expected = golden.arrays[stored]
        assert np.ptp(expected) > 1
        np.testing.assert_allclose(features[name], expected, atol=1e-5, rtol=0)
    for name, width in config.widths().items():
        assert features[name].shape == (2, width)
    assert features["spatial"].shape == (2, 2023)
    exported = export_state_dict("inception-fid", config, params)
    assert exported.keys() == golden.state_dict.keys()
    for key, array in golden.state_dict.items():
        np.testing.assert_array_equal(exported[key], array)


@pytest.mark.parametrize("size", [(64, 48), (299, 299), (256, 320), (512, 301), (1, 2)])
def test_resizing_is_bilinear_from_the_corner(size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    found = resize_images(jnp.asarray(images))
    expected = images.astype(np.float64)
    for axis, old in zip((1, 2), size, strict=True):
        at = np.arange(INPUT_SIDE) * old / INPUT_SIDE
        low = np.floor(at).astype(int)
        share = np.expand_dims(at - low, [i for i in range(4) if i != axis])
        left, right = expected.take(low, axis), expected.take(np.minimum(low + 1, old - 1), axis)
        expected = (1 - share) * left + share * right
    np.testing.assert_allclose(found, (expected - 128) / 128, atol=2e-4, rtol=0)
    if size == (299, 299):
        np.testing.assert_array_equal(found, (images.astype(np.float32) - 128) / 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 3}, "channels 3 must be even"),
        ({"channels": 0}, "channels 0 must be even and at least 2"),
        ({"num_logits": 0}, "num_logits 0 must be at least 1"),
        ({"width": 2}, "no field 'width'; fields: channels, num_logits"),
    ],
)
def test_what_is_no_shape_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        InceptionConfig.from_dict(fields)
