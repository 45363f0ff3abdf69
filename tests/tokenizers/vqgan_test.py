import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgil_jax.tokenizers import vqgan


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_group_norm_matches_a_float64_reference(dtype, tolerance):
    rng = np.random.default_rng(0)
    # A mean far from zero: the variance as a difference of squares would lose its digits.
    x = (30 + rng.standard_normal((2, 5, 3, 64))).astype(np.float32)
    x = np.asarray(jnp.asarray(x, dtype), np.float64)
    scale, bias = rng.standard_normal((2, 64)).astype(np.float32)
    grouped = x.reshape(2, 15, 32, 2)
    mean = grouped.mean((1, 3), keepdims=True)
    variance = grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    params = {"params": {"scale": scale, "bias": bias}}
    found = vqgan.GroupNorm().apply(params, jnp.asarray(x, dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, atol=tolerance, rtol=tolerance
    )


def test_upsampling_repeats_every_pixel():
    x = np.arange(2 * 3 * 2 * 4, dtype=np.float32).reshape(2, 3, 2, 4)
    expected = x.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(vqgan.upsample_nearest(jnp.asarray(x)), expected)


def test_attention_reaches_every_position_of_its_own_image():
    block = vqgan.AttentionBlock()
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 32))
    variables = jax.jit(block.init)(jax.random.key(1), x)
    reach = jax.jit(jax.grad(lambda x: block.apply(variables, x)[0, 0, 0].sum()))(x)
    assert (np.abs(reach[0]).max(-1) > 0).all()
    np.testing.assert_array_equal(reach[1], 0)


def test_attention_matches_a_float64_reference():
    block = vqgan.AttentionBlock()
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 32))
    params = jax.jit(block.init)(jax.random.key(1), x)["params"]
    normed = vqgan.GroupNorm().apply({"params": params["norm"]}, x)
    flat = np.asarray(normed, np.float64).reshape(6, 32)

    def project(name, values):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        return values @ np.asarray(kernel, np.float64)[0, 0] + np.asarray(bias, np.float64)

    logits = project("q", flat) @ project("k", flat).T / np.sqrt(32)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    attended = project("out", weights @ project("v", flat)).reshape(x.shape)
    np.testing.assert_allclose(block.apply({"params": params}, x), x + attended, atol=1e-5)
