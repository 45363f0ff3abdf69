import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from scipy import stats

from maskgil_jax.decoding import categorical

DRAWS = 20_000


def random_logits(size, seed=0):
    """Uneven logits; from four codes on, some are forbidden."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal(size).astype(np.float32)
    if size > 3:
        logits[rng.permutation(size)[: size // 3]] = -np.inf
    return logits


@pytest.mark.parametrize("size", [1, 2, 3, 9, 10, 17, 64, 90])
def test_codes_are_drawn_from_the_softmax(size):
    logits = random_logits(size)
    keys = jax.random.split(jax.random.key(size), 2)
    uniforms = categorical.uniforms_per_image(keys, DRAWS // 2)
    tiled = jnp.broadcast_to(logits, (2, DRAWS // 2, size))
    codes, log_probs = jax.jit(categorical.draw_categorical)(tiled, uniforms)
    probabilities = references.softmax(logits.astype(np.float64))
    counts = np.bincount(np.ravel(codes), minlength=size)
    np.testing.assert_array_equal(counts[probabilities == 0], 0)
    expected = DRAWS * probabilities[probabilities > 0]
    chi_square = np.sum((counts[probabilities > 0] - expected) ** 2 / expected)
    assert chi_square <= stats.chi2.ppf(1 - 1e-4, max(len(expected) - 1, 1))
    np.testing.assert_allclose(log_probs, np.log(probabilities[np.asarray(codes)]), atol=1e-5)


@pytest.mark.parametrize("size", [5, 16, 23])
def test_no_uniform_number_leads_to_a_forbidden_code(size):
    rng = np.random.default_rng(size)
    weights = np.where(rng.random((200, size)) < 0.4, 0, rng.exponential(size=(200, size)))
    weights[:, size // 2] = 1
    ends = np.array([0, 2**-24, 0.5, 1 - 2**-24])
    # On top of the ends, numbers that land on the borders between codes.
    borders = np.cumsum(weights, 1) / weights.sum(1, keepdims=True)
    border = np.minimum(borders[:, rng.integers(size, size=4)], 1 - 2**-24)
    outer, inner = np.meshgrid(ends, ends)
    pairs = np.stack([outer.ravel(), inner.ravel()], -1)
    pairs = np.concatenate([np.broadcast_to(pairs, (200, 16, 2)), np.stack([border] * 2, -1)], 1)
    with np.errstate(divide="ignore"):
        logits = np.broadcast_to(np.log(weights)[:, None], (200, 20, size)).astype(np.float32)
    codes, log_probs = categorical.draw_categorical(jnp.asarray(logits), jnp.float32(pairs))
    assert np.all(np.take_along_axis(weights, np.asarray(codes), axis=1) > 0)
    assert np.all(np.isfinite(log_probs))


def test_the_most_probable_code_comes_with_its_probability():
    logits = jax.random.normal(jax.random.key(0), (3, 4, 7)) * 5
    codes, log_probs = categorical.argmax_code(logits)
    np.testing.assert_array_equal(codes, np.argmax(logits, -1))
    expected = np.log(references.softmax(np.asarray(logits, np.float64)).max(-1))
    np.testing.assert_allclose(log_probs, expected, atol=1e-6)


def test_large_logits_do_not_overflow():
    logits = jnp.array([[[1e30, 1e30, -1e30]]])
    codes, log_probs = categorical.draw_categorical(logits, jnp.full((1, 1, 2), 0.9))
    assert int(codes[0, 0]) < 2
    assert float(log_probs[0, 0]) == pytest.approx(np.log(0.5))


def test_uniforms_depend_on_the_key_of_their_image_alone():
    keys = jax.random.split(jax.random.key(0), 3)
    together = categorical.uniforms_per_image(keys, 5)
    for index in range(3):
        alone = categorical.uniforms_per_image(keys[index : index + 1], 5)
        np.testing.assert_array_equal(together[index], alone[0])
    assert len(np.unique(together)) == together.size
