"""Labels and mixtures of labels as vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import linen as nn

from maskgil_jax.models.bert import BidirectionalTransformerConfig
from maskgil_jax.models.conditioning import embed_labels

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPE = references.TINY | dict(num_layers=1)
# Every family, the name of the table that holds its classes, and the row of class 0.
MODELS = {
    "separate": (references.tiny_config(num_layers=1), "label_embed", 0),
    "shared": (references.tiny_config(num_layers=1, embeddings="shared"), "token_embed", 30),
    "bert": (BidirectionalTransformerConfig(**SHAPE), None, 30),
}


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, labels):
    return config.make_module().apply({"params": params}, tokens, labels)


def random_params(config):
    tokens, labels = np.zeros((1, *config.grid_size), np.int32), np.zeros(1, np.int32)
    shapes = jax.eval_shape(config.make_module().init, jax.random.key(0), tokens, labels)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.4 * rng.standard_normal(leaf.shape)).astype(np.float32),
        nn.unbox(shapes["params"]),
    )


def test_a_mixture_is_the_weighted_sum_of_the_rows():
    table = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    weights = np.array([[1, 0, 0], [0.25, 0.75, 0], [0.2, 0.3, 0.5]], np.float32)
    found = np.asarray(embed_labels(jnp.asarray(table), weights, first=5))
    assert found.shape == (3, 1, 4)
    np.testing.assert_allclose(found[:, 0], weights @ table[5:8], atol=1e-6)
    rows = np.asarray(embed_labels(jnp.asarray(table), np.array([2, 0], np.int8), first=5))
    np.testing.assert_array_equal(rows[:, 0], table[[7, 5]])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_mixtures_of_its_classes(name):
    config, table, first = MODELS[name]
    params = random_params(config)
    tokens, labels = references.random_inputs(config, batch=3)
    eye = np.eye(config.num_classes + 1, dtype=np.float32)
    plain = np.asarray(logits_of(config, params, tokens, labels))
    np.testing.assert_array_equal(logits_of(config, params, tokens, eye[labels]), plain)
    # A mixture is what a class would be whose row is the mixture of the rows.
    path = [table, "embedding"] if table else ["token_embed"]
    rows = np.array(functools.reduce(lambda node, key: node[key], path, params))
    mixed = (0.25 * eye[1] + 0.75 * eye[4])[None].repeat(3, 0)
    rows[first] = 0.25 * rows[first + 1] + 0.75 * rows[first + 4]
    changed = params | {path[0]: {"embedding": rows} if table else rows}
    expected = logits_of(config, changed, tokens, np.zeros(3, np.int32))
    found = logits_of(config, params, tokens, mixed)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - logits_of(config, params, tokens, np.full(3, 4, np.int32))).max() > 1e-3
