import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgil_jax.tokenizers import quantizers
from maskgil_jax.tokenizers.quantizers import VectorQuantizer, nearest_codes, normalize


def reference(latents, codebook, l2_normalize):
    """Tokens, margins to the second nearest code, and codes, in float64."""
    latents, codebook = np.asarray(latents, np.float64), np.asarray(codebook, np.float64)
    if l2_normalize:
        latents = latents / np.linalg.norm(latents, axis=-1, keepdims=True)
        codebook = codebook / np.linalg.norm(codebook, axis=-1, keepdims=True)
    differences = latents[..., None, :] - codebook
    distances = (differences**2).sum(-1)
    nearest = np.sort(distances, axis=-1)
    tokens = distances.argmin(-1)
    return tokens, nearest[..., 1] - nearest[..., 0], codebook[tokens]


def random_case(codes=300, width=8):
    rng = np.random.default_rng(3)
    latents = 3.0 * rng.standard_normal((2, 4, 6, width))
    # Codes of very different lengths: only normalising both sides gives the angle's answer.
    lengths = np.exp(rng.standard_normal((codes, 1)))
    codebook = lengths * rng.standard_normal((codes, width))
    return jnp.asarray(latents, jnp.float32), jnp.asarray(codebook, jnp.float32)


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_matches_a_float64_reference(l2_normalize):
    latents, codebook = random_case()
    module = VectorQuantizer(300, 8, l2_normalize)
    params = {"params": {"codebook": codebook}}
    expected, margin, codes = reference(latents, codebook, l2_normalize)
    clear = margin >= 1e-4
    assert clear.mean() > 0.95
    quantized = jax.jit(module.apply)(params, latents)
    np.testing.assert_array_equal(quantized.tokens[clear], expected[clear])
    np.testing.assert_allclose(quantized.codes[clear], codes[clear], atol=1e-5)
    np.testing.assert_allclose(quantized.straight_through, quantized.codes, atol=1e-5)
    np.testing.assert_array_equal(module.apply(params, latents, method="encode"), quantized.tokens)
    looked_up = module.apply(params, quantized.tokens, method="look_up")
    np.testing.assert_allclose(looked_up, quantized.codes, atol=1e-6)


def test_normalising_changes_the_answer():
    latents, codebook = random_case()
    assert not np.array_equal(
        reference(latents, codebook, True)[0], reference(latents, codebook, False)[0]
    )


# 300 codes: one block, an exact multiple, a ragged last block, one code at a time.
@pytest.mark.parametrize("block", [300, 512, 100, 7, 1])
def test_blocks_do_not_change_the_answer(block):
    latents, codebook = random_case()
    expected, margin, _ = reference(latents, codebook, False)
    tokens = nearest_codes(latents, codebook, block)
    clear = margin >= 1e-4
    np.testing.assert_array_equal(tokens[clear], expected[clear])
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize("block", [8, 3, 2])
def test_a_tie_takes_the_lowest_code_within_and_across_blocks(block):
    codebook = jnp.eye(4)[jnp.array([0, 1, 0, 2, 1, 3, 2, 3])]
    np.testing.assert_array_equal(nearest_codes(jnp.eye(4), codebook, block), [0, 1, 3, 5])


def test_memory_stays_within_a_block_of_codes():
    positions, codes, width = 4096, 16384, 8
    latents = jax.ShapeDtypeStruct((positions, width), jnp.float32)
    codebook = jax.ShapeDtypeStruct((codes, width), jnp.float32)
    compiled = jax.jit(nearest_codes).lower(latents, codebook).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 2.5 * positions * quantizers.CODE_BLOCK * 4 < positions * codes * 4


def test_gradients_pass_straight_through_to_the_latents_alone():
    latents, codebook = random_case()
    target = np.random.default_rng(9).standard_normal(latents.shape).astype(np.float32)

    def loss(latents, codebook, quantize):
        return jnp.sum(target * quantize(latents, codebook))

    def straight_through(latents, codebook):
        module = VectorQuantizer(300, 8)
        return module.apply({"params": {"codebook": codebook}}, latents).straight_through

    to_latents, to_codebook = jax.grad(loss, (0, 1))(latents, codebook, straight_through)
    as_if_identity = jax.grad(loss)(latents, codebook, lambda x, _: normalize(x))
    np.testing.assert_allclose(to_latents, as_if_identity, atol=1e-6)
    assert np.abs(to_latents).max() > 0
    np.testing.assert_array_equal(to_codebook, 0)


def test_a_zero_vector_normalises_to_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: normalize(x).sum())(jnp.zeros(8))
    assert value == 0
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_initial_codebook(l2_normalize):
    module = VectorQuantizer(64, 8, l2_normalize)
    params = module.init(jax.random.key(0), jnp.ones((1, 1, 1, 8)))["params"]
    codebook = params["codebook"]
    if l2_normalize:
        np.testing.assert_allclose(jnp.linalg.norm(codebook, axis=-1), 1.0, atol=1e-6)
    else:
        assert 0.9 / 64 < np.abs(codebook).max() <= 1 / 64
    assert len(np.unique(codebook, axis=0)) == 64
