import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tokenizer_goldens import check_tokenizer

from maskgil_jax.tokenizers import lookup_free, vqgan
from maskgil_jax.tokenizers.base import Tokenizer
from maskgil_jax.tokenizers.open_magvit2 import (
    AdaptiveGroupNorm,
    OpenMAGVIT2Config,
    depth_to_space,
)

SMALL = dict(codebook_size=64, channels=32, channel_multipliers=(1, 2), num_res_blocks=1)


@pytest.fixture(scope="module")
def params():
    """Random weights of unit gain; Flax's own initialisation takes far longer to compile."""
    module, rng = OpenMAGVIT2Config(**SMALL).make_module(), np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return np.full(leaf.shape, float(name == "scale"), np.float32)
        return (rng.standard_normal(leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))).astype(
            np.float32
        )

    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return jax.tree_util.tree_map_with_path(draw, abstract["params"])


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).uniform(-1, 1, (4, 8, 12, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("config",))
def encode_latents(config, params, images):
    return config.make_module().apply({"params": params}, images, method="encode_latents")


def test_matches_the_original_implementation():
    tokenizer = check_tokenizer("open-magvit2", "open_magvit2_tiny")
    assert tokenizer.spec.family == "open-magvit2"


def test_the_published_size_matches_the_original_implementation():
    tokenizer = check_tokenizer("open-magvit2", "open_magvit2_full")
    assert tokenizer.config == OpenMAGVIT2Config()
    spec = tokenizer.spec
    assert (spec.codebook_size, spec.downsample_factor, spec.embed_dim) == (262144, 16, 18)


def test_bits_of_tokens():
    latents = jnp.asarray([[0.5, -0.5, 0.0, 2.0], [-1.0, 1e-9, -1.0, -1.0]])[None, None]
    quantized = lookup_free.quantize(latents)
    # Zero is no positive latent: its bit is not set.
    np.testing.assert_array_equal(quantized.tokens[0, 0], [0b1001, 0b0010])
    np.testing.assert_array_equal(quantized.signs[0, 0, 0], [1, -1, -1, 1])
    np.testing.assert_allclose(quantized.straight_through, quantized.signs, atol=1e-6)
    every = jnp.arange(2**18, dtype=jnp.int32)
    signs = lookup_free.decode_signs(every, 18)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    np.testing.assert_array_equal(lookup_free.encode_signs(signs), every)
    last = jnp.asarray([2**lookup_free.MAX_BITS - 1], jnp.int32)
    np.testing.assert_array_equal(
        lookup_free.encode_signs(lookup_free.decode_signs(last, lookup_free.MAX_BITS)), last
    )


def test_far_latents_are_still_signs():
    latents = jnp.asarray([[[[3e4, -3e4, 1e8, -1e-8]]]])
    signs = [1.0, -1.0, 1.0, -1.0]
    for compute in (lookup_free.quantize, jax.jit(lookup_free.quantize)):
        np.testing.assert_array_equal(compute(latents).straight_through[0, 0, 0], signs)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_unsigned_tokens_decode_to_signs(dtype):
    tokens = np.asarray([0b100101, 0], dtype)
    signs = lookup_free.decode_signs(jnp.asarray(tokens), 6)
    np.testing.assert_array_equal(signs, [[1, -1, 1, -1, -1, 1], [-1] * 6])


def test_gradients_pass_the_quantiser_unchanged():
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 2, 3)), jnp.float32)
    weights = jnp.arange(12.0).reshape(latents.shape)
    through = jax.grad(lambda x: jnp.sum(weights * lookup_free.quantize(x).straight_through))
    np.testing.assert_array_equal(through(latents), weights)
    signs = jax.grad(lambda x: jnp.sum(weights * lookup_free.quantize(x).signs))
    np.testing.assert_array_equal(signs(latents), jnp.zeros_like(weights))


def test_depth_to_space_lays_quarters_of_the_channels_in_tiles():
    x = jnp.arange(2 * 3 * 8.0).reshape(1, 2, 3, 8)
    tiled = depth_to_space(x)
    assert tiled.shape == (1, 4, 6, 2)
    for row, column, quarter in [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]:
        np.testing.assert_array_equal(
            tiled[:, row::2, column::2], x[..., 2 * quarter : 2 * quarter + 2]
        )


def test_adaptive_norm_follows_the_code_map():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 4, 6, 64)), jnp.float32)
    codes = jnp.asarray(rng.choice([-1.0, 1.0], (2, 2, 3, 5)), jnp.float32)
    module = AdaptiveGroupNorm()
    params = module.init(jax.random.key(0), x, codes)["params"]
    weights = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
    grouped = np.asarray(x, np.float64).reshape(2, 24, 32, 2)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    normed = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    deviation = np.sqrt(np.asarray(codes, np.float64).var((1, 2), ddof=1) + 1e-6)
    scale = deviation @ weights["gamma"]["kernel"] + weights["gamma"]["bias"]
    shift = np.asarray(codes).mean((1, 2)) @ weights["beta"]["kernel"] + weights["beta"]["bias"]
    expected = normed * scale[:, None, None] + shift[:, None, None]
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights)
    np.testing.assert_allclose(module.apply({"params": weights}, x, codes), expected, atol=2e-5)


def test_a_single_token_decodes_to_finite_pixels(params):
    tokenizer = Tokenizer(config=OpenMAGVIT2Config(**SMALL), params=params)
    pixels = np.asarray(tokenizer.decode(np.asarray([[[5]], [[60]]], np.int32)))
    assert pixels.shape == (2, 2, 2, 3)
    assert np.isfinite(pixels).all()
    assert not np.array_equal(pixels[0], pixels[1])


def test_a_forward_pass_agrees_with_encode_and_decode(params, images):
    config = OpenMAGVIT2Config(**SMALL)
    outputs = jax.jit(config.make_module().apply)({"params": params}, images)
    tokenizer = Tokenizer(config=config, params=params)
    assert outputs.codebook is None
    assert len(np.unique(outputs.tokens)) > 16
    np.testing.assert_array_equal(outputs.tokens, tokenizer.encode(images))
    np.testing.assert_array_equal(outputs.quantized, np.where(outputs.latents > 0, 1, -1))
    decoded = tokenizer.decode(outputs.tokens)
    np.testing.assert_allclose(outputs.reconstruction, decoded, atol=1e-4)


def test_bfloat16_stays_near_float32_and_keeps_float32_parameters(params, images):
    config = OpenMAGVIT2Config(**SMALL, dtype="bfloat16")
    exact = encode_latents(OpenMAGVIT2Config(**SMALL), params, images)
    rounded = encode_latents(config, params, images)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.05 * float(jnp.abs(exact).max()))
    assert not np.array_equal(rounded, exact)
    abstract = jax.eval_shape(config.make_module().init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}


def test_a_few_steps_of_training_learn(params, images):
    module = OpenMAGVIT2Config(**SMALL).make_module()
    # Flat tiles of one token each, eight colours in all.
    images = vqgan.upsample_nearest(jnp.asarray(np.sign(images[:, ::2, ::2])))
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        def loss(params):
            outputs = module.apply({"params": params}, images, train=True)
            commitment = jnp.mean(jnp.square(outputs.latents - outputs.quantized))
            reconstruction = jnp.mean(jnp.square(outputs.reconstruction - images))
            return reconstruction + 0.25 * commitment, reconstruction

        (_, error), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, error, gradients

    history = []
    for _ in range(40):
        params, state, error, gradients = step(params, state)
        history.append(float(error))
    assert history[-1] < 0.6 * history[0], history
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients))


def test_config_survives_json():
    config = OpenMAGVIT2Config(**SMALL, dtype="bfloat16")
    assert OpenMAGVIT2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match="no field 'embed_dim'.*Fields: codebook_size"):
        OpenMAGVIT2Config.from_dict({"embed_dim": 18})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("codebook_size", 1000, "codebook_size is 1000.*power of two"),
        ("codebook_size", -4, r"codebook_size is -4.*2 to 2\*\*30"),
        ("codebook_size", 1, "codebook_size is 1;"),
        ("codebook_size", 2**31, "codebook_size is 2147483648"),
        ("num_res_blocks", 0, "num_res_blocks is 0"),
        ("channels", 48, "channels is 48.*multiple of 32"),
        ("channel_multipliers", (), "at least one level"),
        ("dtype", "float16", "'float16'.*float32, bfloat16"),
    ],
)
def test_config_refuses_what_is_not_allowed(field, value, message):
    with pytest.raises(ValueError, match=message):
        OpenMAGVIT2Config(**{field: value})
