"""Chameleon computes what the original does, with a cache and without, whole and split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from goldens_lib import load_golden

from maskgil_jax.convert import import_state_dict
from maskgil_jax.decoding import autoregressive, masked, rows
from maskgil_jax.models.chameleon import PUBLISHED, ChameleonConfig, Prefix, without_prompt
from maskgil_jax.sharding import make_mesh, state_shardings

# Ids of 20 codes, in no order, and of the new line.
STREAM_IDS = np.random.default_rng(0).permutation(128)[:21].astype(np.int32)
TINY = dict(vocab_size=30, num_layers=2, width=16, mlp_width=24, num_heads=4, num_kv_heads=2)


@functools.cache
def load():
    golden = load_golden("chameleon_lm_tiny")
    settings = golden.config | {"model_type": "chameleon", "max_position_embeddings": 64}
    return golden, *import_state_dict("chameleon", golden.state_dict, settings=settings)


@functools.partial(jax.jit, static_argnums=0)
def compute(config, params, ids):
    return config.make_module().apply({"params": params}, ids)


def one_by_one(config, params, prefix, stream):
    """Logits of every code of a stream, computed token by token."""
    length = stream.shape[1]
    logits, cache = start(config, params, prefix, length)
    found = [logits]
    for i in range(length - 1):
        logits, cache = step(config, prefix.ids.shape[1], length, params, stream[:, i], i, cache)
        found.append(logits)
    return np.stack(found, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def start(config, params, prefix, length):
    return config.make_cached(params, STREAM_IDS, prefix.ids.shape[1]).start(prefix, length)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def step(config, count, length, params, tokens, i, cache):
    model = config.make_cached(params, STREAM_IDS, count)
    return model.step(tokens, i, count + length, cache)


def random_ids(shape, count=128, seed=0):
    return np.random.default_rng(seed).integers(0, count, shape).astype(np.int32)


def test_golden_logits():
    golden, config, params = load()
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    found = compute(config, params, golden.arrays["input_ids"].astype(np.int32))
    np.testing.assert_allclose(found, golden.arrays["logits"], atol=1e-4, rtol=0)


def test_logits_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    images = dict(embed_dim=8, num_embeddings=16, latent_channels=8, resolution=32)
    images |= dict(base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1)
    # Other sizes than the golden's: another base, one head of keys for three of queries.
    sizes = dict(vocab_size=50, hidden_size=48, intermediate_size=40, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=32)
    rope = {"rope_theta": 50.0, "rope_type": "default"}
    theirs = transformers.ChameleonForConditionalGeneration(
        transformers.ChameleonConfig(
            **sizes, rope_parameters=rope, vq_config=images, vocabulary_map={"<image>": 5}
        )
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    settings = theirs.config.to_dict()
    state = {key: tensor.detach().numpy() for key, tensor in theirs.state_dict().items()}
    config, params = import_state_dict("chameleon", state, settings=settings)
    assert config.rope_base == 50
    ids = random_ids((2, 12), 50)
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(compute(config, params, ids) / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_logits_from_a_cache_are_those_of_the_whole_sequence(num_kv_heads):
    config = ChameleonConfig(**TINY | {"num_kv_heads": num_kv_heads, "vocab_size": 128})
    params = random_params(config)
    prefix, stream = random_ids((3, 7)), random_ids((3, 9), 21, seed=1)
    whole = compute(config, params, np.concatenate([prefix, STREAM_IDS[stream]], axis=1))
    expected = whole[:, 6:-1, STREAM_IDS[:-1]]
    found = one_by_one(config, params, Prefix(prefix, np.full(3, 7, np.int32)), stream)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_the_golden_from_a_cache():
    golden, config, params = load()
    stream = random_ids((2, 6), 21)
    prefix = golden.arrays["input_ids"].astype(np.int32)
    whole = compute(config, params, np.concatenate([prefix, STREAM_IDS[stream]], axis=1))
    found = one_by_one(config, params, Prefix(prefix, np.full(2, 40, np.int32)), stream)
    np.testing.assert_allclose(found, whole[:, 39:-1, STREAM_IDS[:-1]], atol=1e-5, rtol=0)


def test_bfloat16_stays_so_and_is_near():
    golden, wide, _ = load()
    state = {key: x.astype(jnp.bfloat16) for key, x in golden.state_dict.items()}
    config, params = import_state_dict("chameleon", state, settings=wide.to_hugging_face())
    assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    ids, stream = golden.arrays["input_ids"].astype(np.int32), random_ids((2, 4), 21)
    found, expected = compute(config, params, ids), golden.arrays["logits"]
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean()
    prefix = Prefix(ids, np.full(2, 40, np.int32))
    cached = one_by_one(config, params, prefix, stream)
    whole = compute(config, params, np.concatenate([ids, STREAM_IDS[stream]], axis=1))
    whole = whole[:, 39:-1, STREAM_IDS[:-1]]
    assert np.abs(cached - whole).mean() < 0.05 * np.abs(whole).mean()


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(config.abstract_params()))


def test_padding_in_front_changes_nothing():
    _, config, params = load()
    stream, ids = random_ids((1, 8), 21), random_ids((1, 5), seed=1)
    alone = one_by_one(config, params, Prefix(ids, np.array([5], np.int32)), stream)

    def padded(seed):
        rows = np.concatenate([random_ids((2, 11), seed=seed), np.repeat(ids, 2, 0)], axis=1)
        # The second is no padding, but a longer prompt.
        given = Prefix(rows, np.array([5, 16], np.int32))
        return one_by_one(config, params, given, np.repeat(stream, 2, 0))

    found, other = padded(2), padded(3)
    np.testing.assert_allclose(found[:1], alone, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(found[0], other[0])
    assert np.abs(found[1] - alone[0]).max() > 1e-2
    assert np.abs(found[1] - other[1]).max() > 1e-2


def test_without_its_prompt_an_image_begins_the_sequence():
    _, config, params = load()
    ids, stream = random_ids((2, 9)), random_ids((2, 8), 21)
    prompted = Prefix(ids, np.array([9, 7], np.int32))
    found = one_by_one(config, params, without_prompt(prompted, 3), stream)
    begins = Prefix(ids[:, -3:], np.full(2, 3, np.int32))
    np.testing.assert_allclose(found, one_by_one(config, params, begins, stream), atol=1e-5)


def test_neighbouring_heads_share_keys_and_values():
    config = ChameleonConfig(**TINY)
    params = random_params(config)
    whole = ChameleonConfig(**TINY | {"num_kv_heads": 4})
    attention = dict(params["transformer"]["layers"]["attention"])
    q, kv = attention.pop("q")["kernel"], attention.pop("kv")["kernel"]
    kv = kv.repeat(2, axis=-2)
    attention["qkv"] = {"kernel": np.concatenate([q[:, :, None], kv], axis=2)}
    attention["k_norm"] = {n: x.repeat(2, axis=-2) for n, x in attention["k_norm"].items()}
    layers = params["transformer"]["layers"] | {"attention": attention}
    repeated = params | {"transformer": params["transformer"] | {"layers": layers}}
    ids = random_ids((2, 6), 30)
    expected = compute(whole, repeated, ids)
    np.testing.assert_allclose(compute(config, params, ids), expected, atol=1e-5)


def decode(config, params, prefix, count=11, columns=4):
    """Codes of the first rows of images, guided."""
    forced = rows.force_rows(count, columns, 20)
    sampler = autoregressive.AutoregressiveConfig(guidance_scale=2.0, top_k=10)

    @jax.jit
    def run(params, prefix):
        model = config.make_cached(params, STREAM_IDS, prefix.ids.shape[1])
        tokens = autoregressive.decode(
            autoregressive.CausalPredictor(model.prefix_length, model.start, model.step),
            prefix,
            without_prompt(prefix, 3),
            masked.image_keys(0, np.arange(len(prefix.ids))),
            sampler.program(),
            sampler.plan(),
            count=len(forced),
            forced=forced,
        )
        return rows.take_codes(tokens, forced)

    return np.asarray(run(params, prefix))


@pytest.mark.usefixtures("quick_compilation")
def test_parameters_split_over_a_mesh_draw_the_same_codes():
    _, config, params = load()
    prefix = Prefix(random_ids((4, 9)), np.array([9, 7, 4, 5], np.int32))
    expected = decode(config, params, prefix)
    assert expected.shape == (4, 11)
    assert len(np.unique(expected)) > 5
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    placed = jax.device_put(params, state_shardings(config.abstract_params(), mesh))
    assert not placed["head"]["kernel"].sharding.is_fully_replicated
    np.testing.assert_array_equal(decode(config, placed, prefix), expected)


def test_published_size_and_how_it_is_split():
    (config,) = PUBLISHED.values()
    abstract = config.abstract_params()
    leaves = jax.tree.leaves(nn.unbox(abstract))
    # Hugging Face counts 7.04 billion for chameleon-7b, 30 million of them its image encoder's.
    assert sum(leaf.size for leaf in leaves) == 7_013_666_816
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    shardings = jax.tree.leaves(state_shardings(abstract, make_mesh({"tensor": 4})))
    large = [(leaf, s) for leaf, s in zip(leaves, shardings, strict=True) if leaf.size > 10**6]
    assert len(large) == 6
    for leaf, placed in large:
        assert np.prod(placed.shard_shape(leaf.shape)) * 4 == leaf.size


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocab_size": 0}, "vocab_size 0 must be at least 1"),
        ({"num_kv_heads": 3}, "num_heads 4 / num_kv_heads 3 must be a whole number"),
        ({"rope_base": 0.0}, "rope_base 0.0 must be more than 0"),
        ({"qk_norm": "layer"}, "qk_norm 'layer' is unknown; allowed: heads"),
        ({"post_norm": "rms"}, "post_norm 'rms' is unknown; allowed: none"),
        ({"param_dtype": "float16"}, "param_dtype 'float16' .*Did you mean 'bfloat16'"),
        ({"width": 12}, "width 12 / num_heads 4 must be an even number"),
    ],
)
def test_sizes_that_make_no_model_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ChameleonConfig(**TINY | wrong)


def test_settings_of_hugging_face_come_back():
    config = ChameleonConfig(**TINY, rope_base=7.0, max_positions=50)
    settings = config.to_hugging_face()
    assert ChameleonConfig.from_hugging_face(settings) == config
    assert ChameleonConfig.from_dict(config.to_dict()) == config
    newer = settings | {"rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}}
    assert ChameleonConfig.from_hugging_face(newer).rope_base == 9
    narrow = ChameleonConfig.from_hugging_face(settings, param_dtype="bfloat16")
    assert (narrow.dtype, narrow.param_dtype) == ("bfloat16", "bfloat16")
    for wrong, message in (
        ({"model_type": "llama"}, "model_type 'llama'; allowed: 'chameleon'"),
        ({"hidden_size": 4.5}, "hidden_size 4.5, which must be a whole number"),
        ({"rope_theta": "x"}, "rope_theta 'x', which must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            ChameleonConfig.from_hugging_face(settings | wrong)
    del settings["num_key_value_heads"], settings["hidden_size"]
    with pytest.raises(ValueError, match="lacks hidden_size, num_key_value_heads"):
        ChameleonConfig.from_hugging_face(settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"swin_norm": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"tie_word_embeddings": True},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"type": "linear"}},
        {"rms_norm_eps": 1e-6},
        {"rope_type": "yarn"},
    ],
)
def test_what_is_not_implemented_is_refused_by_name(wrong):
    name = next(iter(wrong))
    settings = ChameleonConfig(**TINY).to_hugging_face()
    wrong = {"rope_parameters": wrong} if name == "rope_type" else wrong
    with pytest.raises(ValueError, match=f"what is not implemented: {name} is "):
        ChameleonConfig.from_hugging_face(settings | wrong)


def test_a_prefix_or_ids_that_do_not_fit_are_refused():
    _, config, params = load()
    model = config.make_cached(params, STREAM_IDS, 5)
    prefix = Prefix(random_ids((1, 5)), np.array([5], np.int32))
    with pytest.raises(ValueError, match="5 ids .* 60 tokens of the image are 65; .*64"):
        jax.eval_shape(lambda: model.start(prefix, 60))
    with pytest.raises(ValueError, match="the prefix has 5 ids; expected: 6"):
        jax.eval_shape(lambda: config.make_cached(params, STREAM_IDS, 6).start(prefix, 4))
    with pytest.raises(ValueError, match="from 0 to 128, but the model knows 0 to 127"):
        config.make_cached(params, np.array([0, 128]), 5)
