import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgil_jax.tokenizers import losses
from maskgil_jax.tokenizers.base import VQOutputs
from maskgil_jax.tokenizers.lookup_free import quantize as lookup_free_quantize
from maskgil_jax.tokenizers.losses import TokenizerLossWeights, tokenizer_loss
from maskgil_jax.tokenizers.quantizers import VectorQuantizer

CODES = 16


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 8, 8, 3))
    reconstruction = images + 0.3 * rng.standard_normal(images.shape)
    latents, codebook = rng.standard_normal((2, 4, 4, 8)), rng.standard_normal((CODES, 8))
    arrays = (images, reconstruction, latents, codebook)
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def quantize(latents, codebook, reconstruction):
    module = VectorQuantizer(CODES, 8)
    quantized = module.apply({"params": {"codebook": codebook}}, latents)
    return VQOutputs(
        reconstruction, quantized.tokens, quantized.latents, quantized.codes, quantized.codebook
    )


def reference_entropy(latents, codebook, temperature):
    latents = np.asarray(latents, np.float64).reshape(-1, latents.shape[-1])
    codebook = np.asarray(codebook, np.float64)
    logits = -((latents[:, None] - codebook[None]) ** 2).sum(-1) / temperature
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    per_position = -(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean()
    mean = p.mean(0)
    return per_position + (mean * np.log(mean + 1e-5)).sum()


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_terms_match_their_formulas_and_add_up(case, kind):
    images, reconstruction, latents, codebook = case
    outputs = quantize(latents, codebook, reconstruction)
    weights = TokenizerLossWeights(reconstruction_kind=kind, reconstruction=2.0, entropy=0.1)
    loss, metrics = tokenizer_loss(outputs, images, weights)
    error = np.asarray(reconstruction, np.float64) - np.asarray(images, np.float64)
    expected = np.mean(error**2) if kind == "l2" else np.mean(np.abs(error))
    gap = np.mean((np.asarray(outputs.latents) - np.asarray(outputs.quantized)) ** 2)
    entropy = reference_entropy(outputs.latents, outputs.codebook, 0.01)
    np.testing.assert_allclose(metrics["reconstruction"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["codebook"], gap, rtol=1e-5)
    np.testing.assert_allclose(metrics["commitment"], gap, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    total = 2 * expected + gap + 0.25 * gap + 0.1 * entropy
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    assert metrics["loss"] == loss


def test_the_codebook_learns_from_the_codebook_loss_only(case):
    images, reconstruction, latents, codebook = case

    def gradients(**weights):
        chosen = {"reconstruction": 0.0, "codebook": 0.0, "commitment": 0.0} | weights

        def loss(latents, codebook):
            module = VectorQuantizer(CODES, 8)
            quantized = module.apply({"params": {"codebook": codebook}}, latents)
            # A decoder that sees every code, so that the reconstruction depends on them.
            decoded = reconstruction + jnp.mean(quantized.straight_through)
            outputs = quantize(latents, codebook, decoded)
            return tokenizer_loss(outputs, images, TokenizerLossWeights(**chosen))[0]

        return [float(jnp.abs(g).max()) for g in jax.jit(jax.grad(loss, (0, 1)))(latents, codebook)]

    for name, to_latents, to_codebook in (
        ("reconstruction", True, False),
        ("commitment", True, False),
        ("codebook", False, True),
        ("entropy", True, True),
    ):
        found = gradients(**{name: 1.0})
        assert [g > 0 for g in found] == [to_latents, to_codebook], (name, found)


def test_without_its_weight_the_entropy_term_costs_nothing(case):
    images, reconstruction, latents, codebook = case
    outputs = quantize(latents, codebook, reconstruction)
    positions = outputs.tokens.size

    def holds_a_table(weights):
        jaxpr = jax.make_jaxpr(lambda o: tokenizer_loss(o, images, weights)[0])(outputs)
        sizes = [v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars]
        return any(shape == (positions, CODES) for shape in sizes)

    assert "entropy" not in tokenizer_loss(outputs, images, TokenizerLossWeights())[1]
    assert not holds_a_table(TokenizerLossWeights())
    assert holds_a_table(TokenizerLossWeights(entropy=0.1))


def test_entropy_prefers_sure_and_even_assignments():
    codebook = jnp.eye(4)
    even = codebook.reshape(1, 2, 2, 4)
    one_code = jnp.broadcast_to(codebook[0], (1, 2, 2, 4))
    unsure = jnp.full((1, 2, 2, 4), 0.5)
    np.testing.assert_allclose(losses.entropy_loss(even, codebook), -np.log(4), atol=1e-3)
    np.testing.assert_allclose(losses.entropy_loss(one_code, codebook), 0, atol=1e-3)
    np.testing.assert_allclose(losses.entropy_loss(unsure, codebook), 0, atol=1e-3)


def test_codebook_health():
    tokens = jnp.array([[[0, 0], [3, 3]]])
    assert losses.codebook_usage(tokens, 8) == 0.25
    counts = losses.count_codes(tokens, 8)
    np.testing.assert_array_equal(counts, [2, 0, 0, 2, 0, 0, 0, 0])
    np.testing.assert_allclose(losses.perplexity(counts), 2.0, rtol=1e-6)
    np.testing.assert_allclose(losses.perplexity(jnp.ones(8, jnp.int32)), 8.0, rtol=1e-6)


def test_metrics_report_the_codes_of_the_batch(case):
    images, reconstruction, latents, codebook = case
    outputs = quantize(latents, codebook, reconstruction)
    metrics = tokenizer_loss(outputs, images, TokenizerLossWeights())[1]
    used = len(np.unique(outputs.tokens))
    assert 1 < used < CODES
    np.testing.assert_allclose(metrics["usage"], used / CODES)
    assert 1 < metrics["perplexity"] <= used


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reconstruction_kind", "l3"),
        ("codebook", -1.0),
        ("commitment", -0.25),
        ("entropy", -0.1),
        ("perceptual", -1.0),
        ("perceptual", float("nan")),
        ("entropy_temperature", 0.0),
    ],
)
def test_weights_refuse_what_is_not_allowed(field, value):
    with pytest.raises(ValueError, match=rf"{field} is '?{value}"):
        dataclasses.replace(TokenizerLossWeights(), **{field: value})


def lookup_free(latents):
    """Outputs of a lookup-free tokenizer with these latents, as float32."""
    latents = jnp.asarray(latents, jnp.float32)
    quantized = lookup_free_quantize(latents)
    images = jnp.zeros((latents.shape[0], 8, 8, 3))
    return images, VQOutputs(images + 0.5, quantized.tokens, latents, quantized.signs, None)


def brute_entropy(latents, temperature):
    """Entropies from the table of all codes, in float64, as the published code forms them."""
    bits = latents.shape[-1]
    codes = np.array(list(itertools.product((-1.0, 1.0), repeat=bits)))
    logits = 2 * np.asarray(latents, np.float64).reshape(-1, bits) @ codes.T / temperature
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    per_position = -(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean()
    mean = p.mean(0)
    return per_position + (mean * np.log(mean + 1e-5)).sum()


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_lookup_free_entropy_is_that_of_the_whole_table(bits, temperature):
    latents = 0.5 * np.random.default_rng(bits).standard_normal((2, 3, 4, bits))
    found = losses.lookup_free_entropy_loss(jnp.asarray(latents, jnp.float32), temperature)
    expected = brute_entropy(np.float32(latents), temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_lookup_free_entropy_needs_no_table_of_positions_by_codes():
    latents = jnp.zeros((2, 4, 4, 12))
    jaxpr = jax.make_jaxpr(jax.grad(losses.lookup_free_entropy_loss))(latents)

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.size for v in eqn.outvars)
            for value in eqn.params.values():
                yield from sizes(value.jaxpr) if hasattr(value, "jaxpr") else ()

    # 32 positions by 64 half-codes, or 64 by 64; the table would have 32 by 4096.
    assert max(sizes(jaxpr.jaxpr)) <= 64 * 64


def test_lookup_free_terms_add_up_and_reach_the_latents():
    images, outputs = lookup_free(np.random.default_rng(0).standard_normal((2, 3, 3, 4)))
    weights = TokenizerLossWeights(codebook=0.0, entropy=0.1, entropy_temperature=1.0)
    loss, metrics = tokenizer_loss(outputs, images, weights)
    assert set(metrics) == set(losses.metric_names(weights, lookup_free=True))
    signs = np.where(np.asarray(outputs.latents) > 0, 1, -1)
    gap = np.mean((np.asarray(outputs.latents, np.float64) - signs) ** 2)
    np.testing.assert_allclose(metrics["commitment"], gap, rtol=1e-5)
    entropy = brute_entropy(outputs.latents, 1.0)
    np.testing.assert_allclose(loss, 0.25 + 0.25 * gap + 0.1 * entropy, rtol=1e-4)
    np.testing.assert_allclose(metrics["usage"], len(np.unique(outputs.tokens)) / 16)

    def gradient(latents, **changes):
        chosen = dataclasses.replace(weights, reconstruction=0.0, **changes)
        return jax.grad(lambda z: tokenizer_loss(outputs._replace(latents=z), images, chosen)[0])(
            latents
        )

    for changes in ({"commitment": 0.0}, {"entropy": 0.0}):
        assert float(jnp.abs(gradient(outputs.latents, **changes)).max()) > 1e-3
    # Far from a decision, where exponentials underflow, nothing becomes NaN.
    far = gradient(outputs.latents * 1e4, entropy_temperature=0.01)
    assert np.isfinite(far).all()


def test_a_codebook_weight_without_a_codebook_is_refused():
    images, outputs = lookup_free(np.ones((1, 2, 2, 3)))
    with pytest.raises(ValueError, match="weight codebook is 1.0, but a lookup-free"):
        tokenizer_loss(outputs, images, TokenizerLossWeights())


def test_the_perceptual_term_is_the_mean_of_the_function_given(case):
    images, reconstruction, latents, codebook = case
    outputs = quantize(latents, codebook, reconstruction)
    weights = TokenizerLossWeights(perceptual=2.0)

    def distance(real, fake):
        return jnp.sum(jnp.abs(real - fake), axis=(1, 2, 3))

    loss, metrics = tokenizer_loss(outputs, images, weights, distance)
    expected = np.abs(np.asarray(images) - np.asarray(reconstruction)).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(metrics["perceptual"], expected, rtol=1e-5)
    plain = tokenizer_loss(outputs, images, TokenizerLossWeights())[0]
    np.testing.assert_allclose(loss, plain + 2 * expected, rtol=1e-5)
    assert set(metrics) == set(losses.metric_names(weights))
    with pytest.raises(ValueError, match="weight perceptual is 2.0; give the function too"):
        tokenizer_loss(outputs, images, weights)
