import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from goldens_lib import load_golden

from maskgil_jax.build import models as build
from maskgil_jax.convert import ConversionError, import_state_dict
from maskgil_jax.decoding import autoregressive, masked
from maskgil_jax.models.captions import Caption
from maskgil_jax.models.llamagen_text import LlamaGenTextConfig
from maskgil_jax.models.maskgil_text import MaskGILTextConfig

quick = pytest.mark.usefixtures("quick_compilation")
TINY = dict(
    num_layers=2,
    width=32,
    num_heads=2,
    mlp_width=64,
    codebook_size=11,
    grid_size=(3, 4),
    text_width=8,
    text_length=12,
)
BYTES = dict(text="bytes", byte_heads=2, byte_layers=1, byte_patch=2, ngram_rows=16)
# What captions are, whether they have rotary rows, and whether there are norms on the way.
VARIANTS = pytest.mark.parametrize(
    "changes",
    [
        dict(cond_rope="zero"),
        dict(cond_rope="identity", qk_norm="layer", post_norm="rms"),
        BYTES,
    ],
)


@functools.cache
def random_params(config):
    """Parameters in which nothing is zero, as the head is at first."""
    params = nn.unbox(build.init_model(config)(jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, caption):
    return config.make_module().apply({"params": params}, tokens, caption)


@functools.partial(jax.jit, static_argnums=0)
def cached_logits(config, params, tokens, caption):
    """Logits of all tokens, computed one by one."""
    model = config.make_cached(params)
    length = tokens.shape[1]
    logits, cache = model.start(caption, length)
    rows = [logits]
    for i in range(length - 1):
        live = min(model.prefix_length + i + 1 + i % 3, model.prefix_length + length)
        logits, cache = model.step(tokens[:, i], i, live, cache)
        rows.append(logits)
    return jnp.stack(rows, axis=1)


def random_inputs(config, lengths, s=12, seed=0):
    rng = np.random.default_rng(seed)
    b = len(lengths)
    tokens = rng.integers(0, config.codebook_size, (b, *config.grid_size))
    if config.text == "bytes":
        values = rng.integers(0, 256, (b, s))
    else:
        values = rng.standard_normal((b, s, config.text_width)).astype(np.float32)
    return tokens.astype(np.int32), Caption(values, np.array(lengths, np.int32))


def read_golden():
    golden = load_golden("llamagen_ar_t2i_tiny")
    config, params = import_state_dict(
        "llamagen-text", golden.state_dict, num_heads=2, grid_size=(8, 8)
    )
    return golden.arrays, config, params


def test_logits_are_those_of_the_original_implementation():
    arrays, config, params = read_golden()
    assert (config.codebook_size, config.text_length, config.num_prefill) == (64, 120, 120)
    caption = Caption(arrays["cond"], np.full(2, 120, np.int32))
    logits = logits_of(config, params, arrays["tokens"].reshape(2, 8, 8), caption)
    np.testing.assert_allclose(logits[:, [0, 1, 8, 63]], arrays["logits"], atol=1e-4, rtol=0)


def test_greedy_codes_with_guidance_are_those_of_the_original_implementation():
    arrays, config, params = read_golden()
    caption = Caption(jnp.asarray(arrays["cond"]), jnp.full(2, 120, jnp.int32))
    sampler = autoregressive.AutoregressiveConfig(guidance_scale=2.0, temperature=0.0)

    @jax.jit
    def decode(params):
        return autoregressive.decode(
            build.make_causal_predictor(config, params),
            caption,
            config.null_condition(caption),
            masked.image_keys(0, np.arange(2)),
            sampler.program(),
            sampler.plan(),
            count=64,
        )

    np.testing.assert_array_equal(decode(params), arrays["greedy"])


def test_a_checkpoint_without_the_caption_is_refused():
    state = load_golden("llamagen_ar_t2i_tiny").state_dict
    del state["cls_embedding.uncond_embedding"]
    with pytest.raises(ConversionError, match="uncond_embedding"):
        import_state_dict("llamagen-text", state, num_heads=2, grid_size=(8, 8))


@quick
@VARIANTS
def test_logits_from_a_cache_are_those_of_the_whole_sequence(changes):
    config = LlamaGenTextConfig(**TINY | changes | dict(grid_size=(2, 3)))
    # Whole, padded, "no condition" in place of a caption, and by itself.
    tokens, caption = random_inputs(config, [12, 5, -3, 0])
    params = random_params(config)
    whole = logits_of(config, params, tokens, caption)
    one_by_one = cached_logits(config, params, tokens.reshape(4, 6), caption)
    np.testing.assert_allclose(one_by_one, whole, atol=1e-5, rtol=0)


@quick
@VARIANTS
def test_padding_changes_nothing(changes):
    config = LlamaGenTextConfig(**TINY | changes)
    params = random_params(config)
    tokens, caption = random_inputs(config, [7, 5, 1])
    expected = logits_of(config, params, tokens, caption)
    there = np.arange(12) < caption.lengths[:, None]
    there = there if config.text == "bytes" else there[..., None]
    other = np.where(there, caption.values, caption.values[::-1] + 1)
    found = logits_of(config, params, tokens, Caption(other, caption.lengths))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    # Nor does how far it goes.
    short = Caption(caption.values[:, :7], caption.lengths)
    found = logits_of(config, params, tokens, short)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@quick
@pytest.mark.parametrize("length", [5, -5])
def test_a_padded_caption_is_the_same_in_a_model_that_has_no_room_for_padding(length):
    config = LlamaGenTextConfig(**TINY, cond_rope="zero")
    params = random_params(config)
    tokens, caption = random_inputs(config, [length] * 3)
    narrow = dataclasses.replace(config, text_length=5)
    # Of the null caption the last tokens are seen, as the padding stands in front.
    embed = params["caption_embed"] | {"null_caption": params["caption_embed"]["null_caption"][-5:]}
    expected = logits_of(config, params, tokens, caption)
    short = Caption(caption.values[:, :5], caption.lengths)
    found = logits_of(narrow, params | {"caption_embed": embed}, tokens, short)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@quick
@VARIANTS
def test_every_part_of_a_caption_counts_and_nothing_behind_its_end(changes):
    config = LlamaGenTextConfig(**TINY | changes)
    params = random_params(config)
    tokens, caption = random_inputs(config, [12, 5, 5])
    values = jnp.asarray(caption.values)
    before = logits_of(config, params, tokens, caption)
    for place, seen in ((0, True), (4, True), (5, False), (11, False)):
        changed = values.at[1, place].set(values[0, place] + (1 if config.text == "bytes" else 1.0))
        after = logits_of(config, params, tokens, Caption(changed, caption.lengths))
        assert bool(jnp.any(jnp.abs(after[1] - before[1]) > 1e-6)) == seen, place


@quick
@VARIANTS
def test_the_null_caption_is_seen_as_far_as_the_one_it_stands_for(changes):
    config = LlamaGenTextConfig(**TINY | changes)
    params = random_params(config)
    tokens, caption = random_inputs(config, [12, 5, 5, 0])
    nothing = config.null_condition(caption)
    dropped = config.drop_condition(caption, jnp.array([False, True, False, True]))
    expected = logits_of(config, params, tokens, nothing)
    found = logits_of(config, params, tokens, dropped)
    full = logits_of(config, params, tokens, caption)
    np.testing.assert_array_equal(found[1::2], expected[1::2])
    np.testing.assert_array_equal(found[::2], full[::2])
    assert float(jnp.abs(full - expected)[:3].max(2).min()) > 1e-4
    # Whatever "no condition" is dropped again, it stays so.
    again = config.null_condition(nothing)
    np.testing.assert_array_equal(again.lengths, nothing.lengths)

    def total(null):
        embed = params["caption_embed"] | {"null_caption": null}
        logits = logits_of(config, params | {"caption_embed": embed}, tokens, nothing)
        return jnp.sum(jnp.sin(logits), axis=(1, 2))

    jacobian = jax.jit(jax.jacrev(total))(params["caption_embed"]["null_caption"])
    seen = np.any(np.asarray(jacobian) != 0, axis=-1)
    rows = config.num_prefill
    of_five = -(-5 // config.byte_patch)
    counts = np.array([rows, of_five, of_five, rows])
    np.testing.assert_array_equal(seen, np.arange(rows)[None] >= rows - counts[:, None])


@quick
@VARIANTS
def test_a_token_is_predicted_from_those_before_it(changes):
    config = LlamaGenTextConfig(**TINY | changes)
    params = random_params(config)
    tokens, caption = random_inputs(config, [5])
    before = logits_of(config, params, tokens, caption)
    for place in (0, 6, 11):
        changed = tokens.reshape(1, 12).copy()
        changed[0, place] = (changed[0, place] + 1) % 11
        after = logits_of(config, params, changed.reshape(1, 3, 4), caption)
        moved = np.abs(np.asarray(after - before))[0].max(-1) > 1e-6
        np.testing.assert_array_equal(moved, np.arange(12) > place)


@quick
def test_all_parameters_learn():
    config = LlamaGenTextConfig(**TINY | BYTES)
    tokens, caption = random_inputs(config, [12, 5, -7])

    def total(params):
        return jnp.sum(jnp.sin(config.make_module().apply({"params": params}, tokens, caption)))

    gradients = jax.jit(jax.grad(total))(random_params(config))
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert np.any(np.asarray(gradient) != 0), path


def test_lengths_of_no_condition_are_checked():
    config = LlamaGenTextConfig(**TINY)
    _, caption = random_inputs(config, [-12, 3])
    assert config.check_condition(caption).lengths.tolist() == [-12, 3]
    for wrong in (-13, 13):
        with pytest.raises(ValueError, match="caption length 13 is out of range"):
            config.check_condition(Caption(caption.values, np.array([wrong, 3])))
    # There, "no condition" has one length.
    with pytest.raises(ValueError, match="caption length -12 is out of range"):
        MaskGILTextConfig(**TINY).check_condition(caption)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text": "byte"}, "text 'byte' is unknown.*'bytes'"),
        ({"text_length": 0}, "text_length 0 must be at least 1"),
        ({"cond_rope": "table"}, "cond_rope 'table' is unknown"),
        ({"rope_base": 0.0}, "rope_base 0.0 must be more than 0"),
        ({"embedding_dropout": 1.0}, "embedding_dropout 1.0 is out of range"),
        ({"byte_patch": 4}, "byte_patch 4 has no meaning with text 'features'"),
        (BYTES | {"byte_heads": 3}, "encoder of bytes.*width 8 / num_heads 3"),
        ({"width": 36, "num_heads": 6}, "divisible by 4, not 6"),
        ({"grid_size": (3, 0)}, "grid_size"),
    ],
)
def test_settings_that_make_no_model(changes, match):
    with pytest.raises(ValueError, match=match):
        LlamaGenTextConfig(**TINY | changes)


def test_configs_are_rebuilt_from_their_fields():
    config = LlamaGenTextConfig(**TINY | BYTES)
    assert LlamaGenTextConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"unknown fields \['null_length'\]"):
        LlamaGenTextConfig.from_dict(config.to_dict() | {"null_length": 1})
