import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax import export

from maskgil_jax.build import models as build
from maskgil_jax.decoding import masked, prediction
from maskgil_jax.decoding.sampler import SamplerConfig
from maskgil_jax.models.bert import BidirectionalTransformerConfig

MASK, NULL, LENGTH = 11, 5, 12


def features_of(tokens, labels):
    """Features [b, l, e] that depend on the sequence, the position and the label."""
    place, word = (jax.random.normal(jax.random.key(i), (13, 6)) for i in range(2))
    context = jnp.mean(word[tokens], axis=1, keepdims=True)
    return place[None, :LENGTH] * 2 + context + jnp.sin(word[labels] * 3)[:, None]


def head_of(features, positions):
    kernel = jax.random.normal(jax.random.key(2), (6, MASK + 1))
    return jnp.einsum("bne,ev->bnv", features, kernel) + jnp.sin(positions)[..., None]


def run(predictor, tokens, labels, sampler, shared=None):
    tokens, labels = jnp.asarray(tokens, jnp.int32), jnp.asarray(labels, jnp.int32)
    batch = masked.Batch(
        tokens=tokens,
        condition=labels,
        null_condition=jnp.full_like(labels, NULL),
        rngs=masked.image_keys(0, np.arange(len(tokens))),
        plan=sampler.plan(jnp.sum(tokens == MASK, axis=1), LENGTH),
        shared=shared,
    )
    decode = functools.partial(
        masked.decode_batch, predictor, program=sampler.program(), mask_token_id=MASK
    )
    return np.asarray(jax.jit(lambda batch: decode(batch)[0])(batch))


def start_tokens(*unknown):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MASK, (len(unknown), LENGTH))
    for row, count in zip(tokens, unknown, strict=True):
        row[rng.permutation(LENGTH)[:count]] = MASK
    return tokens


@pytest.mark.parametrize(
    "settings",
    [{"remasking": "cap", "remasking_strength": 0.4}, {"guidance_scale": 1.0, "top_k": 4}],
    ids=["guided", "unguided"],
)
def test_a_head_at_masked_positions_only_gives_the_same_tokens(monkeypatch, settings):
    sampler = SamplerConfig(num_steps=5, **settings)
    tokens, labels = start_tokens(12, 7, 12), [0, 1, 2]
    counts = []

    def counted_head(features, positions):
        counts.append(features.shape[1])
        return head_of(features, positions)

    predictor = prediction.Predictor(features_of, counted_head)
    expected = run(predictor, tokens, labels, sampler)
    assert set(counts) == {LENGTH}
    monkeypatch.setattr(prediction, "_MIN_LENGTH", 1)
    monkeypatch.setattr(prediction, "_SHARES", (0.25, 0.5, 1.0))
    np.testing.assert_array_equal(run(predictor, tokens, labels, sampler), expected)
    assert set(counts) == {3, 6, LENGTH}


def test_the_head_is_computed_for_the_fewest_positions_that_hold_all_masked_ones(monkeypatch):
    monkeypatch.setattr(prediction, "_MIN_LENGTH", 1)
    monkeypatch.setattr(prediction, "_SHARES", (0.25, 0.5, 1.0))
    features = jnp.arange(24.0).reshape(2, 12, 1)
    seen = []

    def read(features, positions):
        picked = prediction.take_positions(features, positions)[..., 0]
        jax.debug.callback(lambda x: seen.append(x.shape[1]), picked)
        return picked, jnp.asarray(positions, jnp.float32)

    at_masked = jax.jit(lambda masked: prediction.at_masked(masked, features, read, (-1.0, -2.0)))
    for needed, length in [(0, 3), (3, 3), (4, 6), (6, 6), (7, 12), (12, 12)]:
        marked = np.zeros((2, 12), bool)
        marked[0, ::-1][:needed] = True
        values, positions = (np.asarray(x) for x in at_masked(jnp.asarray(marked)))
        jax.effects_barrier()
        assert seen == [length]
        seen.clear()
        np.testing.assert_array_equal(values[marked], np.asarray(features[..., 0])[marked])
        np.testing.assert_array_equal(
            positions[marked], np.broadcast_to(np.arange(12), (2, 12))[marked]
        )
        assert np.sum(values == -1) == np.sum(positions == -2) == 2 * (12 - length)


def test_a_head_at_masked_positions_is_lowered_for_any_batch(monkeypatch):
    monkeypatch.setattr(prediction, "_MIN_LENGTH", 1)
    sampler = SamplerConfig(num_steps=3, guidance_scale=2.0)

    def decode(labels, rngs):
        batch = masked.Batch(
            tokens=jnp.full((labels.shape[0], LENGTH), MASK),
            condition=labels,
            null_condition=jnp.full_like(labels, NULL),
            rngs=rngs,
            plan=sampler.plan(jnp.full(labels.shape[0], LENGTH), LENGTH),
        )
        predictor = prediction.Predictor(features_of, head_of)
        return masked.decode_batch(predictor, batch, sampler.program(), mask_token_id=MASK)[0]

    (b,) = export.symbolic_shape("b", constraints=["b >= 1"])
    keys = jax.eval_shape(lambda: masked.image_keys(0, np.arange(1)))
    shapes = jax.ShapeDtypeStruct((b,), jnp.int32), jax.ShapeDtypeStruct((b,), keys.dtype)
    lowered = export.export(jax.jit(decode))(*shapes)
    labels, rngs = jnp.array([0, 2, 1]), masked.image_keys(0, np.arange(3))
    np.testing.assert_array_equal(lowered.call(labels, rngs), decode(labels, rngs))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_first_step_shared_by_images_of_a_kind_gives_the_same_tokens(scale, schedule):
    sampler = SamplerConfig(num_steps=3, guidance_scale=scale, guidance_schedule=schedule)
    tokens, labels = np.full((8, LENGTH), MASK), np.array([3, 1, 3, 3, 1, 3, 1, 1])
    sizes = []

    def counted_features(tokens, labels):
        sizes.append(len(tokens))
        return features_of(tokens, labels)

    predictor = prediction.Predictor(counted_features, head_of)
    expected = run(predictor, tokens, labels, sampler)
    assert min(sizes) >= 8
    shared = prediction.Shared(rows=jnp.array([0, 1]), groups=jnp.asarray((labels == 1) * 1))
    actual = run(predictor, tokens, labels, sampler, shared)
    assert min(sizes) == (4 if scale != 1 and schedule == "constant" else 2)
    np.testing.assert_array_equal(actual, expected)
    assert len(np.unique(expected, axis=0)) > 3


@pytest.mark.parametrize("family", ["maskgil", "bidirectional-transformer"])
def test_the_parts_of_a_model_make_the_whole(family):
    config = references.tiny_config(num_layers=1, grid_size=(3, 4), num_heads=4)
    if family != "maskgil":
        fields = {f.name for f in dataclasses.fields(BidirectionalTransformerConfig)}
        config = BidirectionalTransformerConfig(
            **{name: value for name, value in dataclasses.asdict(config).items() if name in fields}
        )
    params = references.random_params(config)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, config.codebook_size + 1, (2, 12)), jnp.int32)
    labels = jnp.array([0, config.null_label])
    whole = config.make_module().apply({"params": params}, tokens.reshape(2, 3, 4), labels)
    predictor = build.make_predictor(config, params)
    positions = jnp.array([[0, 5, 11], [2, 3, 1]])
    features = prediction.take_positions(predictor.features(tokens, labels), positions)
    logits = predictor.head(features, positions)
    expected = np.take_along_axis(np.asarray(whole), np.asarray(positions)[..., None], axis=1)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert np.ptp(expected) > 0.1
