import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from maskgil_jax.training.losses import smoothed_cross_entropy


def random_case(scale=3.0):
    rng = np.random.default_rng(0)
    logits = (scale * rng.standard_normal((3, 5, 7))).astype(np.float32)
    return logits, rng.integers(0, 7, (3, 5)).astype(np.int32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_closed_form_is_the_cross_entropy_against_smoothed_targets(smoothing):
    logits, targets = random_case()
    losses = smoothed_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), smoothing)
    expected = references.cross_entropy(logits, targets, smoothing)
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)


def test_its_gradient_is_softmax_minus_smoothed_target():
    logits, targets = random_case()
    gradient = jax.grad(lambda z: jnp.sum(smoothed_cross_entropy(z, jnp.asarray(targets), 0.1)))(
        jnp.asarray(logits)
    )
    wanted = 0.9 * np.eye(7)[targets] + 0.1 / 7
    np.testing.assert_allclose(
        gradient, references.softmax(logits.astype(np.float64)) - wanted, atol=1e-6
    )


def test_bfloat16_logits_are_summed_in_float32():
    logits, targets = random_case()
    rounded = jnp.asarray(logits, jnp.bfloat16)
    losses = smoothed_cross_entropy(rounded, jnp.asarray(targets), 0.1)
    assert losses.dtype == jnp.float32
    expected = references.cross_entropy(np.asarray(rounded, np.float64), targets, 0.1)
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)


def test_large_logits_stay_finite():
    logits, targets = random_case(scale=1e4)
    losses = smoothed_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), 0.1)
    assert np.all(np.isfinite(losses))
