import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from flax import linen as nn
from goldens_lib import load_golden

from maskgil_jax.convert import import_state_dict
from maskgil_jax.models.maskgil import MaskGIL, MaskGILConfig

quick = pytest.mark.usefixtures("quick_compilation")
GOLDENS = {
    "bidirectional_llama_tiny": ("maskgil", [0, 1, 8, 63]),
    "bidirectional_llama_b_full": ("maskgil", [0, 1, 16, 255]),
    "maskgil_released_tiny": ("maskgil-released", [0, 1, 17, 100, 255]),
    "maskgil_released_b_full": ("maskgil-released", [0, 1, 17, 100, 255]),
}
RELEASED = dict(condition="last", rope="1d", cond_rope="table", embeddings="shared")


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, labels):
    return MaskGIL(config).apply({"params": params}, tokens, labels)


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_are_those_of_the_original_implementation(name):
    family, positions = GOLDENS[name]
    golden = load_golden(name)
    stored, arrays = golden.config, golden.arrays
    side = int(stored["block_size"] ** 0.5)
    config, params = import_state_dict(
        family, golden.state_dict, num_heads=stored["n_head"], grid_size=(side, side)
    )
    if "drop" in arrays:
        labels = np.where(arrays["drop"], stored["num_classes"], arrays["labels"])
    else:
        labels = arrays["cond"]
    tokens = arrays["tokens"].reshape(-1, side, side)
    logits = logits_of(config, params, tokens.astype(np.int32), labels.astype(np.int32))
    np.testing.assert_allclose(logits[:, positions], arrays["logits"], atol=1e-4, rtol=0)


@quick
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "layer", "post_norm": "rms"},
        {"qk_norm": "rms", "post_norm": "layer"},
        {"cond_rope": "zero", "norm_eps": 1e-2},
        {"condition": "last", "embeddings": "shared", "grid_size": (5, 3)},
        {"rope": "1d", "rope_base": 100.0, "num_layers": 3, "num_heads": 4},
        RELEASED | {"qk_norm": "layer"},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "default",
)
def test_logits_are_those_of_the_formulas(changes):
    config = references.tiny_config(**changes)
    params = references.random_params(config)
    tokens, labels = references.random_inputs(config, batch=3)
    expected = references.forward(config, params, tokens, labels)
    logits = logits_of(config, params, tokens, labels)
    assert logits.shape == (3, 15, config.codebook_size + 1)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)


@quick
def test_another_grid_than_the_configured_one_is_served():
    config = references.tiny_config()
    params = references.random_params(config)
    tokens, labels = references.random_inputs(references.tiny_config(grid_size=(2, 4)))
    expected = references.forward(config, params, tokens, labels)
    np.testing.assert_allclose(
        logits_of(config, params, tokens, labels), expected, atol=1e-5, rtol=1e-5
    )


@quick
def test_the_model_looks_ahead_and_back():
    config = references.tiny_config()
    params = references.random_params(config)
    # Every position holds a code of its own, so a row of the table is a position's embedding.
    codes = np.random.default_rng(0).permutation(config.codebook_size)[:15].astype(np.int32)

    def outputs(table):
        changed = params | {"token_embed": {"embedding": table}}
        return logits_of(config, changed, codes.reshape(1, 3, 5), np.zeros(1, np.int32))[0].sum(-1)

    jacobian = jax.jit(jax.jacrev(outputs))(jnp.asarray(params["token_embed"]["embedding"]))
    influence = np.abs(np.asarray(jacobian)[:, codes]).sum(-1)
    assert influence.min() > 1e-6


@quick
@pytest.mark.parametrize("changes", [{}, RELEASED])
def test_the_condition_reaches_every_token(changes):
    config = references.tiny_config(**changes)
    params = references.random_params(config)
    tokens, _ = references.random_inputs(config, batch=1)
    tokens = np.repeat(tokens, config.num_classes + 1, axis=0)
    logits = np.asarray(logits_of(config, params, tokens, np.arange(6, dtype=np.int32)))
    for label in range(5):
        assert np.abs(logits[label] - logits[5]).max(-1).min() > 1e-4


@quick
@pytest.mark.parametrize("embeddings", ["shared", "separate"])
def test_labels_may_be_of_a_narrow_type(embeddings):
    config = references.tiny_config(embeddings=embeddings, codebook_size=300)
    params, (tokens, labels) = references.random_params(config), references.random_inputs(config)
    expected = logits_of(config, params, tokens, labels)
    np.testing.assert_array_equal(
        logits_of(config, params, tokens.astype(np.int16), labels.astype(np.int8)), expected
    )


@quick
def test_the_head_starts_at_zero_and_the_rest_does_not():
    config = references.tiny_config()
    tokens, labels = references.random_inputs(config)
    params = nn.unbox(jax.jit(MaskGIL(config).init)(jax.random.key(0), tokens, labels))["params"]
    zero = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not np.any(leaf)
    }
    assert zero == {"['head']['kernel']"}
    kernel = params["transformer"]["layers"]["mlp"]["gate_up"]["kernel"]
    np.testing.assert_allclose(kernel.std(axis=(1, 2, 3)), 0.02, rtol=0.1)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


@functools.partial(jax.jit, static_argnums=0)
def gradients(config, params, tokens, labels, key):
    def loss(params):
        logits = MaskGIL(config).apply(
            {"params": params}, tokens, labels, train=True, rngs={"dropout": key}
        )
        return jnp.sum(jnp.tanh(logits) * jnp.arange(logits.shape[-1])[None, None])

    return jax.grad(loss)(params)


@quick
@pytest.mark.parametrize(
    ("changes", "trace"),
    [
        ({"remat": "full"}, "policy=None"),
        ({"remat": "dots"}, "policy=DotsSaveable"),
        ({"scan_unroll": 2}, "unroll=2"),
    ],
)
def test_how_gradients_are_computed_does_not_change_them(changes, trace):
    common = dict(dropout=0.2, qk_norm="rms", num_layers=4)
    plain, config = references.tiny_config(**common), references.tiny_config(**common, **changes)
    params, inputs = references.random_params(plain), references.random_inputs(plain)
    rest = (params, *inputs, jax.random.key(7))
    assert trace not in str(jax.make_jaxpr(gradients, static_argnums=0)(plain, *rest))
    assert trace in str(jax.make_jaxpr(gradients, static_argnums=0)(config, *rest))
    expected, actual = gradients(plain, *rest), gradients(config, *rest)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@quick
def test_head_alignment_changes_no_logit():
    config = references.tiny_config()
    params, inputs = references.random_params(config), references.random_inputs(config)
    expected = logits_of(config, params, *inputs)
    for alignment in (1, 7, 30):
        aligned = references.tiny_config(head_alignment=alignment)
        np.testing.assert_allclose(logits_of(aligned, params, *inputs), expected, atol=1e-6)


def test_bfloat16_computes_near_float32_and_answers_in_it():
    config = references.tiny_config(dtype="bfloat16", post_norm="rms", qk_norm="layer")
    params, inputs = references.random_params(config), references.random_inputs(config)
    logits = logits_of(config, params, *inputs)
    expected = references.forward(config, params, *inputs)
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.05
    assert {leaf.dtype for leaf in jax.tree.leaves(references.boxed_params(config))} == {
        np.dtype(np.float32)
    }


@quick
@pytest.mark.parametrize("field", ["dropout", "embedding_dropout"])
def test_dropout_acts_in_training_only_and_follows_its_key(field):
    config = references.tiny_config(**{field: 0.5})
    params, inputs = references.random_params(config), references.random_inputs(config)

    @jax.jit
    def train(key):
        rngs = {"dropout": key}
        return MaskGIL(config).apply({"params": params}, *inputs, train=True, rngs=rngs)

    first, again, other = (np.asarray(train(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    evaluated = logits_of(config, params, *inputs)
    without = logits_of(references.tiny_config(), params, *inputs)
    np.testing.assert_array_equal(evaluated, without)


@quick
def test_output_norm_is_the_root_mean_square_before_the_final_norm():
    config = references.tiny_config()
    params, inputs = references.random_params(config), references.random_inputs(config)
    apply = jax.jit(functools.partial(MaskGIL(config).apply, mutable=["intermediates"]))
    _, sown = apply({"params": params}, *inputs)
    (value,) = sown["intermediates"]["transformer"]["output_norm"]
    stream = references.residual_stream(config, params, *inputs)
    assert value == pytest.approx(np.sqrt(np.mean(stream**2)), rel=1e-5)


def test_config_survives_json():
    config = references.tiny_config(**RELEASED, qk_norm="layer")
    fields = config.to_dict()
    assert isinstance(fields["grid_size"], list)
    assert MaskGILConfig.from_dict(fields) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": "frist"}, "condition 'frist' is unknown; .*Did you mean 'first'"),
        ({"rope": "3d"}, "rope '3d' is unknown"),
        ({"cond_rope": "identiy"}, "Did you mean 'identity'"),
        ({"cond_rope": "table"}, "'table' needs rope '1d'"),
        ({"codebook_size": 0}, "codebook_size 0 must be at least 1"),
        ({"grid_size": (0, 4)}, r"grid_size \(0, 4\) must be two numbers of at least 1"),
        ({"rope_base": 0.0}, "rope_base 0.0 must be more than 0"),
        ({"embedding_dropout": -0.1}, "embedding_dropout -0.1 is out of range"),
        ({"num_heads": 16}, "rope '2d' needs a head dimension divisible by 4, not 2"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        references.tiny_config(**changes)


def test_unknown_and_missing_fields_are_listed():
    fields = references.tiny_config().to_dict()
    del fields["width"]
    with pytest.raises(ValueError, match=r"unknown fields \['widht'\], missing fields \['width'\]"):
        MaskGILConfig.from_dict(fields | {"widht": 3})
