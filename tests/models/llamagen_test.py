import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from goldens_lib import load_golden

from maskgil_jax.build import models as build
from maskgil_jax.convert import export_state_dict, import_state_dict
from maskgil_jax.decoding import autoregressive, masked
from maskgil_jax.models.llamagen import LlamaGenConfig

quick = pytest.mark.usefixtures("quick_compilation")
TINY = dict(
    num_layers=2,
    width=32,
    num_heads=2,
    mlp_width=64,
    codebook_size=11,
    num_classes=4,
    grid_size=(3, 4),
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
def logits_of(config, params, tokens, labels):
    return config.make_module().apply({"params": params}, tokens, labels)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def decode(config, params, labels, sampler, count):
    return autoregressive.decode(
        build.make_causal_predictor(config, params),
        labels,
        config.null_condition(labels),
        masked.image_keys(0, np.arange(len(labels))),
        sampler.program(),
        sampler.plan(),
        count=count,
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def cached_logits(config, params, tokens, labels, live):
    """Logits of all tokens, computed one by one."""
    model = config.make_cached(params)
    length = tokens.shape[1]
    logits, cache = model.start(labels, length)
    rows = [logits]
    for i in range(length - 1):
        logits, cache = model.step(tokens[:, i], i, live or 1 + length, cache)
        rows.append(logits)
    return jnp.stack(rows, axis=1)


def read_golden(name, grid):
    golden = load_golden(name)
    config, params = import_state_dict("llamagen", golden.state_dict, num_heads=2, grid_size=grid)
    return golden, config, params


def test_logits_and_greedy_codes_are_those_of_the_original_implementation():
    golden, config, params = read_golden("llamagen_ar_tiny", (8, 8))
    arrays = golden.arrays
    logits = logits_of(config, params, arrays["tokens"].reshape(2, 8, 8), arrays["cond"])
    np.testing.assert_allclose(logits[:, [0, 1, 8, 63]], arrays["logits"], atol=1e-4, rtol=0)
    sampler = autoregressive.AutoregressiveConfig(guidance_scale=2.0, temperature=0.0)
    codes = decode(config, params, jnp.asarray(arrays["cond"]), sampler, 64)
    np.testing.assert_array_equal(codes, arrays["greedy"])


def test_logits_and_greedy_codes_of_the_full_size():
    golden = load_golden("llamagen_ar_b_full")
    arrays = golden.arrays
    config, params = import_state_dict("llamagen", golden.state_dict)
    assert (config.num_layers, config.num_heads, config.codebook_size) == (12, 12, 16384)
    logits = logits_of(config, params, arrays["tokens"].reshape(2, 16, 16), arrays["cond"])
    np.testing.assert_allclose(logits[:, [0, 1, 16, 255]], arrays["logits"], atol=1e-4, rtol=0)
    sampler = autoregressive.AutoregressiveConfig(guidance_scale=2.0, temperature=0.0)
    codes = decode(config, params, jnp.asarray(arrays["cond"]), sampler, 40)
    np.testing.assert_array_equal(codes, arrays["greedy"])


def test_import_and_export_are_inverse():
    golden, config, params = read_golden("llamagen_ar_tiny", (8, 8))
    back = export_state_dict("llamagen", config, params)
    assert back.keys() == golden.state_dict.keys()
    for key, tensor in golden.state_dict.items():
        np.testing.assert_array_equal(back[key], tensor)


@pytest.mark.parametrize(
    "changes", [{}, {"cond_rope": "zero"}, {"qk_norm": "layer", "post_norm": "rms"}]
)
def test_logits_from_a_cache_are_those_of_the_whole_sequence(changes):
    config = LlamaGenConfig(**TINY, **changes)
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 11, (3, 3, 4)), np.array([0, 3, 4])
    whole = logits_of(config, random_params(config), tokens, labels)
    one_by_one = cached_logits(config, random_params(config), tokens.reshape(3, 12), labels, None)
    np.testing.assert_allclose(one_by_one, whole, atol=1e-5, rtol=0)


@functools.cache
def decode_beyond_a_block():
    """Greedy codes of more tokens than one loop decodes, and the program that drew them."""
    config = LlamaGenConfig(**TINY | {"grid_size": (9, 9)})
    labels = jnp.array([0, 3, 1])
    sampler = autoregressive.AutoregressiveConfig(
        guidance_scale=2.0, guided_tokens=70, temperature=0.0
    )
    compiled = decode.lower(config, random_params(config), labels, sampler, 81).compile()
    return config, labels, compiled(random_params(config), labels), compiled.as_text()


def test_codes_are_the_most_probable_wherever_the_cache_grows_and_guidance_ends():
    config, labels, codes, _ = decode_beyond_a_block()
    spans = autoregressive.make_spans(81, 1, 70)
    assert [(s.live, s.guided) for s in spans] == [(64, True), (82, True), (82, False)]
    conditions = labels, config.null_condition(labels)
    cond, uncond = (
        logits_of(config, random_params(config), codes.reshape(3, 9, 9), c) for c in conditions
    )
    scale = np.where(np.arange(81) < 70, 2.0, 1.0)[None, :, None]
    np.testing.assert_array_equal(codes, np.argmax(uncond + scale * (cond - uncond), axis=-1))
    assert len(np.unique(codes)) > 5


def test_no_step_copies_the_cache():
    *_, program = decode_beyond_a_block()
    caches = {(6, 64), (6, 82), (3, 82)}  # rows and positions
    for rows, length in caches:
        assert f"f32[{rows},2,{length},16]" in program
        assert not re.search(rf"f32\[{rows},2,{length},16\]\S* copy\(", program)


@quick
def test_a_token_is_predicted_from_those_before_it_alone():
    config = LlamaGenConfig(**TINY)
    params, rng = random_params(config), np.random.default_rng(0)
    tokens, labels = rng.integers(0, 11, (1, 3, 4)), np.array([1])
    base = np.asarray(logits_of(config, params, tokens, labels))
    for place in range(12):
        changed = tokens.copy()
        changed.reshape(-1)[place] = (changed.reshape(-1)[place] + 1) % 11
        moved = np.abs(logits_of(config, params, changed, labels) - base).max((0, 2)) > 1e-6
        np.testing.assert_array_equal(moved, np.arange(12) > place)
    relabelled = np.asarray(logits_of(config, params, tokens, np.array([2])))
    assert (np.abs(relabelled - base).max((0, 2)) > 1e-6).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cond_rope": "table"}, "cond_rope 'table' is unknown; allowed: identity, zero"),
        ({"num_heads": 16}, "divisible by 4, not 2"),
        ({"rope_base": 0.0}, "rope_base 0.0 must be more than 0"),
        ({"embedding_dropout": 1.0}, "embedding_dropout 1.0 is out of range"),
    ],
)
def test_settings_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaGenConfig(**TINY | changes)
