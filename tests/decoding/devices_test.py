import functools

import jax
import numpy as np
import pytest
import references

from maskgil_jax import generation, sharding
from maskgil_jax.decoding.masked import SamplerConfig

CONFIG = references.tiny_config(num_layers=1, grid_size=(4, 4), num_heads=4)
SAMPLER = SamplerConfig(num_steps=3, guidance_scale=2.0)
LABELS = [3, 1, 4, 1, 5]


@functools.cache
def generate(mesh_axis, devices, batch_size):
    mesh = sharding.make_mesh({mesh_axis: devices}, jax.devices()[:devices])
    return generation.generate_tokens(
        CONFIG,
        references.random_params(CONFIG),
        LABELS,
        SAMPLER,
        seed=2,
        batch_size=batch_size,
        mesh=mesh,
    )


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize(("axis", "devices"), [("data", 1), ("data", 2), ("fsdp", 4)])
def test_samples_do_not_depend_on_devices_or_batches(axis, devices, batch_size):
    expected, actual = generate("data", 1, 5), generate(axis, devices, batch_size)
    assert expected.shape == (5, 4, 4)
    assert len(np.unique(expected)) > 10
    np.testing.assert_array_equal(actual, expected)


def test_images_of_one_label_differ():
    tokens = generate("data", 1, 5)
    assert np.any(tokens[1] != tokens[3])
