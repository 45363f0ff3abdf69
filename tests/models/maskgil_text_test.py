import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from goldens_lib import load_golden

from maskgil_jax.build import models as build
from maskgil_jax.convert import ConversionError, export_state_dict, import_state_dict
from maskgil_jax.models.captions import NGRAMS, ByteEncoder, Caption, hash_ngrams
from maskgil_jax.models.maskgil_text import MaskGILText, MaskGILTextConfig

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
BYTES = dict(byte_heads=2, byte_layers=1, byte_patch=4, ngram_rows=16)


def tiny_config(**changes):
    reads_bytes = BYTES if changes.get("text") == "bytes" else {}
    return MaskGILTextConfig(**TINY | reads_bytes | changes)


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
    return MaskGILText(config).apply({"params": params}, tokens, caption)


def random_inputs(config, b=3, s=12, seed=0, grid=None):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.codebook_size + 1, (b, *(grid or config.grid_size)))
    if config.text == "bytes":
        values = rng.integers(0, 256, (b, s))
    else:
        values = rng.standard_normal((b, s, config.text_width)).astype(np.float32)
    lengths = np.array([s, 5, 1])[:b]
    return tokens.astype(np.int32), Caption(values, lengths.astype(np.int32))


def test_logits_are_those_of_the_original_implementation():
    golden = load_golden("bidirectional_llama_t2i_tiny")
    arrays = golden.arrays
    config, params = import_state_dict(
        "maskgil-text", golden.state_dict, num_heads=2, grid_size=(8, 8)
    )
    caption = Caption(arrays["cond"], np.full(2, 120, np.int32))
    logits = logits_of(config, params, arrays["tokens"].reshape(2, 8, 8), caption)
    np.testing.assert_allclose(logits[:, [0, 1, 8, 63]], arrays["logits"], atol=1e-4, rtol=0)


def test_import_and_export_are_inverse():
    golden = load_golden("bidirectional_llama_t2i_tiny")
    config, params = import_state_dict(
        "maskgil-text", golden.state_dict, num_heads=2, grid_size=(8, 8)
    )
    back = export_state_dict("maskgil-text", config, params)
    assert back.keys() == golden.state_dict.keys()
    for key, tensor in golden.state_dict.items():
        np.testing.assert_array_equal(back[key], tensor)


def test_a_checkpoint_without_the_caption_is_refused():
    state = load_golden("bidirectional_llama_t2i_tiny").state_dict
    del state["cls_embedding.uncond_embedding"]
    with pytest.raises(ConversionError, match="uncond_embedding"):
        import_state_dict("maskgil-text", state, num_heads=2, grid_size=(8, 8))


@quick
@pytest.mark.parametrize(
    ("text", "rows"), [("features", "identity"), ("bytes", "identity"), ("bytes", "diagonal")]
)
def test_padding_changes_nothing(text, rows):
    config = tiny_config(text=text, cond_rope=rows)
    params = random_params(config)
    tokens, caption = random_inputs(config)
    expected = logits_of(config, params, tokens, caption)
    there = np.arange(12) < caption.lengths[:, None]
    there = there if text == "bytes" else there[..., None]
    other = np.where(there, caption.values, caption.values[::-1] + 1)
    found = logits_of(config, params, tokens, Caption(other, caption.lengths))
    np.testing.assert_array_equal(found, expected)
    # Nor does how far it goes.
    short = Caption(caption.values[1:, :8], caption.lengths[1:])
    found = logits_of(config, params, tokens[1:], short)
    np.testing.assert_allclose(found, expected[1:], atol=2e-5, rtol=0)


@quick
@pytest.mark.parametrize("text", ["features", "bytes"])
def test_every_part_of_a_caption_counts_and_nothing_behind_its_end(text):
    config = tiny_config(text=text)
    params = random_params(config)
    tokens, caption = random_inputs(config)
    values = jnp.asarray(caption.values)
    for place, seen in ((0, True), (4, True), (5, False), (11, False)):
        changed = values.at[1, place].set(values[0, place] + (1 if text == "bytes" else 1.0))
        a = logits_of(config, params, tokens, caption)
        b = logits_of(config, params, tokens, Caption(changed, caption.lengths))
        assert bool(jnp.any(a[1] != b[1])) == seen, place


@quick
def test_the_order_of_a_captions_tokens_is_seen_on_the_diagonal_only():
    tokens, caption = random_inputs(tiny_config(), b=1)
    turned = Caption(caption.values[:, ::-1], caption.lengths)
    for rows, seen in (("identity", False), ("diagonal", True)):
        config = tiny_config(cond_rope=rows)
        params = random_params(config)
        a, b = (logits_of(config, params, tokens, each) for each in (caption, turned))
        assert (np.abs(a - b).max() > 1e-2) == seen, rows


@quick
def test_bytes_are_known_by_their_places():
    # One and the same byte, so nothing else tells one from another.
    config = tiny_config(text="bytes", byte_patch=1)
    encoder = ByteEncoder(config.byte_config(), 1, 16, config.text_length)
    ids, lengths = jnp.full((1, 6), 65), jnp.array([6])
    params = random_params(config)["byte_encoder"]
    features, _ = encoder.apply({"params": params}, ids, lengths)
    alone = jnp.zeros_like(params["embed_position"]["embedding"])
    blind = params | {"embed_position": {"embedding": alone}}
    # From the fifth on, n-grams are alike, too.
    same, _ = encoder.apply({"params": blind}, ids, lengths)
    change = np.abs(features[0, 4] - features[0, 5]).max()
    assert change > 3 * np.abs(same[0, 4] - same[0, 5]).max()
    assert params["embed_position"]["embedding"].shape == (12, 8)


@quick
@pytest.mark.parametrize("text", ["features", "bytes"])
def test_without_a_condition_the_values_are_not_looked_at(text):
    config = tiny_config(text=text, null_length=2)
    params = random_params(config)
    tokens, caption = random_inputs(config)
    nothing = config.null_condition(caption)
    dropped = config.drop_condition(caption, jnp.array([True, False, True]))
    expected = logits_of(config, params, tokens, nothing)
    found = logits_of(config, params, tokens, dropped)
    full = logits_of(config, params, tokens, caption)
    np.testing.assert_array_equal(found[::2], expected[::2])
    np.testing.assert_array_equal(found[1], full[1])
    assert float(jnp.abs(full - expected).max(2).min()) > 1e-4


@quick
@pytest.mark.parametrize("patch", [1, 5])
def test_any_grid_and_the_order_in_a_batch(patch):
    config = tiny_config(text="bytes", byte_patch=patch)
    params = random_params(config)
    tokens, caption = random_inputs(config, grid=(5, 2))
    logits = logits_of(config, params, tokens, caption)
    assert logits.shape == (3, 10, 12)
    back = jax.tree.map(lambda x: x[::-1], caption)
    np.testing.assert_allclose(
        logits_of(config, params, tokens[::-1], back)[::-1], logits, atol=1e-5, rtol=0
    )


@quick
def test_all_parameters_of_the_encoder_of_bytes_learn():
    config = tiny_config(text="bytes")
    tokens, caption = random_inputs(config)
    caption.lengths[2] = 0

    def total(params):
        return jnp.sum(jnp.sin(MaskGILText(config).apply({"params": params}, tokens, caption)))

    gradients = jax.jit(jax.grad(total))(random_params(config))
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert np.any(np.asarray(gradient) != 0), path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text": "byte"}, "text 'byte' is unknown.*'bytes'"),
        ({"text_width": 0}, "text_width 0 must be at least 1"),
        ({"ngram_rows": 16}, "ngram_rows 16 has no meaning with text 'features'; leave it at 2048"),
        ({"byte_patch": 4}, "byte_patch 4 has no meaning"),
        ({"ngram_rows": -1}, "ngram_rows -1 must be at least 0"),
        ({"null_length": 13}, "null_length 13 is more than the 12"),
        ({"text": "bytes", "null_length": 4}, "null_length 4 is more than the 3"),
        ({"text": "bytes", "byte_heads": 3}, "encoder of bytes.*width 8 / num_heads 3"),
        ({"width": 36, "num_heads": 6}, "divisible by 4, not 6"),
        ({"cond_rope": "table"}, "cond_rope 'table' is unknown"),
    ],
)
def test_settings_that_make_no_model(changes, match):
    with pytest.raises(ValueError, match=match):
        tiny_config(**changes)


def test_conditions_that_are_no_captions():
    config = tiny_config()
    values, lengths = np.zeros((2, 12, 8), np.float32), np.array([1, 12])
    with pytest.raises(ValueError, match="is list.*takes captions: give prompts"):
        config.check_condition([1, 2])
    with pytest.raises(ValueError, match=r"shape \(2, 12, 8\).*expected \[b s\]"):
        tiny_config(text="bytes").check_condition(Caption(values, lengths))
    with pytest.raises(ValueError, match=r"expected \[b s 8\]"):
        config.check_condition(Caption(values[..., :7], lengths))
    with pytest.raises(ValueError, match="caption length 13 is out of range"):
        config.check_condition(Caption(values, lengths + 1))
    broken = values.copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="no finite numbers"):
        config.check_condition(Caption(broken, lengths))
    # Behind the end nothing matters.
    broken = values.copy()
    broken[0, 1] = np.nan
    assert np.isfinite(config.check_condition(Caption(broken, lengths)).values).all()
    wrong = Caption(np.full((2, 3), 256), np.array([1, 1]))
    with pytest.raises(ValueError, match="byte 256 is out of range"):
        tiny_config(text="bytes").check_condition(wrong)


def test_configs_are_rebuilt_from_their_fields():
    config = tiny_config(text="bytes", null_length=2)
    assert MaskGILTextConfig.from_dict(config.to_dict()) == config
    assert tiny_config(text="bytes", null_length=1) != config


def test_ngrams_are_known_by_their_bytes_and_nothing_else():
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 256, (50, 40)))
    for length in NGRAMS:
        rows = np.asarray(hash_ngrams(ids, length, 1 << 20))
        seen = {}
        for line, codes in zip(np.asarray(ids), rows, strict=True):
            padded = np.concatenate([np.zeros(length - 1, int), line])
            for place, code in enumerate(codes):
                gram = padded[place : place + length].tobytes()
                assert seen.setdefault(gram, code) == code
        # By chance, a few of 2,000 share a row of a million.
        assert len(set(seen.values())) >= len(seen) - 12
        small = np.bincount(np.asarray(hash_ngrams(ids, length, 7)).ravel(), minlength=7)
        assert len(small) == 7
        assert small.min() > 0.7 * small.mean()


@quick
def test_single_bytes_alone_make_another_model():
    config = tiny_config(text="bytes", ngram_rows=0)
    params = random_params(config)
    assert set(params["byte_encoder"]) == {"embed", "embed_position", "transformer"}
    tokens, caption = random_inputs(config)
    assert np.isfinite(logits_of(config, params, tokens, caption)).all()
    assert "embed_5" in random_params(tiny_config(text="bytes"))["byte_encoder"]
