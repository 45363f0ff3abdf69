import functools
import json
import math

import goldens_lib
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskgil_jax.convert import import_state_dict
from maskgil_jax.tokenizers import vqgan
from maskgil_jax.tokenizers.base import Tokenizer
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig
from maskgil_jax.tokenizers.losses import TokenizerLossWeights, tokenizer_loss

SMALL = dict(
    codebook_size=32,
    channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    latent_channels=16,
)


@pytest.fixture(scope="module")
def params():
    """Random weights of unit gain; Flax's own initialisation takes far longer to compile."""
    module, rng = LlamaGenVQConfig(**SMALL).make_module(), np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return np.full(leaf.shape, float(name == "scale"), np.float32)
        fan_in = math.prod(leaf.shape[:-1]) if name == "kernel" else 1
        return (rng.standard_normal(leaf.shape) / math.sqrt(fan_in)).astype(np.float32)

    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return jax.tree_util.tree_map_with_path(draw, abstract["params"])


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("config", "train"))
def encode_latents(config, params, images, train=False, seed=0):
    rngs = {"dropout": jax.random.key(seed)}
    return config.make_module().apply(
        {"params": params}, images, train, rngs=rngs, method="encode_latents"
    )


@pytest.mark.parametrize("name", ["llamagen_vq_tiny", "llamagen_vq8_full", "llamagen_vq16_full"])
def test_matches_the_original_implementation(name):
    golden = goldens_lib.load_golden(name)
    config, params = import_state_dict("llamagen-vq", golden.state_dict)
    tokenizer = Tokenizer(config=config, params=params)
    side = golden.config["image_size"]
    images = goldens_lib.golden_image((1, side, side, 3), name)

    @jax.jit
    def encode(params, images):
        latents = tokenizer.module.apply({"params": params}, images, method="encode_latents")
        return latents, tokenizer.module.apply({"params": params}, images, method="encode")

    latents, codes = encode(tokenizer.params, images)
    np.testing.assert_allclose(latents, golden.arrays["latent"], atol=1e-4, rtol=0)
    clear = golden.arrays["margin"] >= 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(codes)[clear], golden.arrays["codes"][clear])
    decoded = tokenizer.decode(golden.arrays["decode_codes"])
    stride = side // golden.arrays["decoded"].shape[1]
    expected = golden.arrays["decoded"]
    np.testing.assert_allclose(decoded[:, ::stride, ::stride], expected, atol=1e-3, rtol=0)


def test_rebuilt_image_is_the_one_the_original_saw():
    golden = goldens_lib.load_golden("llamagen_vq_tiny")
    image = goldens_lib.golden_image((1, 32, 32, 3), "llamagen_vq_tiny")
    np.testing.assert_array_equal(image, golden.arrays["image"])


@pytest.mark.parametrize(
    ("multipliers", "factor", "millions"), [((1, 1, 2, 2, 4), 16, 71.9), ((1, 2, 2, 4), 8, 70.1)]
)
def test_published_sizes(multipliers, factor, millions):
    config = LlamaGenVQConfig(channel_multipliers=multipliers)
    spec = config.spec
    assert (spec.codebook_size, spec.downsample_factor, spec.embed_dim) == (16384, factor, 8)
    images = jnp.zeros((1, 64, 64, 3))
    abstract = jax.eval_shape(config.make_module().init, jax.random.key(0), images)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert round(count / 1e6, 1) == millions


def test_a_forward_pass_agrees_with_encode_and_decode(params, images):
    config = LlamaGenVQConfig(**SMALL)
    outputs = jax.jit(config.make_module().apply)({"params": params}, images)
    tokenizer = Tokenizer(config=config, params=params)
    np.testing.assert_array_equal(outputs.tokens, tokenizer.encode(images))
    decoded = tokenizer.decode(outputs.tokens)
    np.testing.assert_allclose(outputs.reconstruction, decoded, atol=1e-4)


def test_bfloat16_stays_near_float32_and_keeps_float32_parameters(params, images):
    config = LlamaGenVQConfig(**SMALL, dtype="bfloat16")
    exact = encode_latents(LlamaGenVQConfig(**SMALL), params, images)
    rounded = encode_latents(config, params, images)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.05 * float(jnp.abs(exact).max()))
    assert not np.array_equal(rounded, exact)
    abstract = jax.eval_shape(config.make_module().init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}


def test_dropout_acts_in_training_only(params, images):
    config = LlamaGenVQConfig(**SMALL, dropout=0.5)
    still = [encode_latents(config, params, images, train=False, seed=seed) for seed in (0, 1)]
    np.testing.assert_array_equal(*still)
    dropped = [encode_latents(config, params, images, train=True, seed=seed) for seed in (0, 1)]
    assert not np.array_equal(*dropped)
    assert not np.array_equal(dropped[0], still[0])


def test_a_few_steps_of_training_learn(params, images):
    module = LlamaGenVQConfig(**SMALL).make_module()
    # Flat tiles of one token each, eight colours in all: what 32 codes can hold.
    images = vqgan.upsample_nearest(jnp.asarray(np.sign(images[:, ::2, ::2])))
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        def loss(params):
            outputs = module.apply({"params": params}, images, train=True)
            return tokenizer_loss(outputs, images, TokenizerLossWeights())

        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, metrics, gradients

    history = []
    for _ in range(40):
        params, state, metrics, gradients = step(params, state)
        history.append(float(metrics["reconstruction"]))
    assert history[-1] < 0.6 * history[0], history
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients["encoder"]))


def test_config_survives_json():
    config = LlamaGenVQConfig(**SMALL, dtype="bfloat16")
    assert LlamaGenVQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match="'codebok_size'; did you mean 'codebook_size'"):
        LlamaGenVQConfig.from_dict({"codebok_size": 8})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("codebook_size", 0, "codebook_size is 0"),
        ("num_res_blocks", 0, "num_res_blocks is 0"),
        ("channels", 48, "channels is 48.*multiple of 32"),
        ("channel_multipliers", (), "at least one level"),
        ("channel_multipliers", (1, 0), r"\(1, 0\)"),
        ("dropout", 1.0, r"dropout is 1.0.*\[0, 1\)"),
        ("dtype", "float16", "'float16'.*float32, bfloat16"),
    ],
)
def test_config_refuses_what_is_not_allowed(field, value, message):
    with pytest.raises(ValueError, match=message):
        LlamaGenVQConfig(**{field: value})
