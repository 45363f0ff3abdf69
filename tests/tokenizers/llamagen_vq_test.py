import json

import goldens_lib
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskgil_jax.convert import import_state_dict
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig, create_tokenizer
from maskgil_jax.tokenizers.losses import TokenizerLossWeights, tokenizer_loss

SMALL = dict(
    codebook_size=32,
    channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    latent_channels=16,
)


def init(config, side=8):
    shape = (1, side, side, config.image_channels)
    return jax.jit(LlamaGenVQ(config).init)(jax.random.key(0), jnp.zeros(shape))["params"]


def random_images(count=4, side=8):
    return jax.random.uniform(jax.random.key(1), (count, side, side, 3), minval=-1, maxval=1)


@pytest.mark.parametrize("name", ["llamagen_vq_tiny", "llamagen_vq8_full", "llamagen_vq16_full"])
def test_matches_the_original_implementation(name):
    golden = goldens_lib.load_golden(name)
    config, params = import_state_dict("llamagen-vq", golden.state_dict)
    tokenizer = create_tokenizer(config, params)
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
    abstract = jax.eval_shape(LlamaGenVQ(config).init, jax.random.key(0), images)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert round(count / 1e6, 1) == millions


def test_a_forward_pass_agrees_with_encode_and_decode():
    config = LlamaGenVQConfig(**SMALL)
    params, images = init(config), random_images()
    outputs = jax.jit(LlamaGenVQ(config).apply)({"params": params}, images)
    tokenizer = create_tokenizer(config, params)
    np.testing.assert_array_equal(outputs.tokens, tokenizer.encode(images))
    decoded = tokenizer.decode(outputs.tokens)
    np.testing.assert_allclose(outputs.reconstruction, decoded, atol=1e-4)


def test_bfloat16_stays_near_float32_and_keeps_float32_parameters():
    params, images = init(LlamaGenVQConfig(**SMALL)), random_images()

    def latents(dtype):
        module = LlamaGenVQ(LlamaGenVQConfig(**SMALL, dtype=dtype))
        return jax.jit(lambda x: module.apply({"params": params}, x, method="encode_latents"))(
            images
        )

    exact, rounded = latents("float32"), latents("bfloat16")
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.05 * float(jnp.abs(exact).max()))
    assert not np.array_equal(rounded, exact)
    bfloat16 = init(LlamaGenVQConfig(**SMALL, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(bfloat16)} == {jnp.dtype("float32")}


def test_dropout_acts_in_training_only():
    config = LlamaGenVQConfig(**SMALL, dropout=0.5)
    module, params, images = LlamaGenVQ(config), init(config), random_images()

    def latents(seed, train):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply({"params": params}, images, train, rngs=rngs, method="encode_latents")

    np.testing.assert_array_equal(latents(0, False), latents(1, False))
    assert not np.array_equal(latents(0, True), latents(1, True))


def test_a_few_steps_of_training_learn():
    config = LlamaGenVQConfig(**SMALL)
    module, params = LlamaGenVQ(config), init(config)
    # Flat tiles: two codes' worth of content that a codebook can hold.
    images = jnp.repeat(jnp.repeat(jnp.sign(random_images(8, 4)), 2, axis=1), 2, axis=2)
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
