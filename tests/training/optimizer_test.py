import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from maskgil_jax.training.optimizer import (
    OptimizerConfig,
    find_matrices,
    make_optimizer,
    make_rate,
)


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 4), "scale": (4,)}
    return {
        name: (scale * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def run(config, params, gradients, num_steps=10):
    """Parameters after one update per gradient."""
    optimizer = make_optimizer(config, num_steps)
    state, history = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_updates_are_those_of_adamw(decay):
    config = OptimizerConfig(
        learning_rate=0.1,
        betas=(0.8, 0.95),
        epsilon=1e-3,
        weight_decay=0.3,
        clip_norm=0.0,
        decay=decay,
    )
    params, gradients = random_tree(0), [random_tree(1), random_tree(2), random_tree(3)]
    history = run(config, params, gradients)
    for name, decays in (("kernel", True), ("scale", decay == "all")):
        values = [params[name].astype(np.float64)]
        moments = [{"first": 0.0, "second": 0.0}]
        for step, (gradient, actual) in enumerate(zip(gradients, history, strict=True), 1):
            values = references.adamw(
                values,
                [gradient[name].astype(np.float64)],
                moments,
                step,
                rate=0.1,
                betas=(0.8, 0.95),
                epsilon=1e-3,
                decay=0.3 if decays else 0.0,
            )
            np.testing.assert_allclose(actual[name], values[0], atol=1e-6)


@pytest.mark.parametrize(("clip", "factor"), [(0.5, 0.05), (20.0, 1.0), (0.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(clip, factor):
    # With zero betas and a large epsilon the update is the gradient itself, scaled.
    config = OptimizerConfig(
        learning_rate=1e6, betas=(0.0, 0.0), epsilon=1e6, weight_decay=0.0, clip_norm=clip
    )
    gradient = {"kernel": np.full((2, 2), 3.0, np.float32), "scale": np.full(1, 8.0, np.float32)}
    params = jax.tree.map(np.zeros_like, gradient)
    (after,) = run(config, params, [gradient])
    for name in gradient:
        np.testing.assert_allclose(after[name], -factor * gradient[name], rtol=1e-4)


def test_the_rate_rises_then_stays():
    rate = make_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=4), 10)
    np.testing.assert_allclose([rate(i) for i in range(7)], [0, 0.5, 1, 1.5, 2, 2, 2])


def test_the_cosine_falls_to_zero_at_the_end():
    rate = make_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=4, rate_schedule="cosine"), 12)
    assert rate(2) == pytest.approx(1)
    expected = [1 + np.cos(np.pi * i / 8) for i in range(9)]
    np.testing.assert_allclose([rate(4 + i) for i in range(9)], expected, atol=1e-6)


def test_the_rate_counts_updates():
    config = OptimizerConfig(
        learning_rate=1.0, betas=(0.0, 0.0), warmup_steps=2, weight_decay=0.0, clip_norm=0.0
    )
    ones = {"kernel": np.ones((2, 2), np.float32)}
    history = run(config, jax.tree.map(np.zeros_like, ones), [ones] * 4)
    # The sign of the gradient times 0, ½, 1, 1.
    np.testing.assert_allclose([h["kernel"][0, 0] for h in history], [0, -0.5, -1.5, -2.5], 1e-5)


def test_matrices_are_what_is_not_scale_or_bias():
    tree = {"a": {"kernel": 1, "scale": 2}, "b": {"bias": 3, "embedding": 4}, "codebook": 5}
    assert find_matrices(tree) == {
        "a": {"kernel": True, "scale": False},
        "b": {"bias": False, "embedding": True},
        "codebook": True,
    }


def test_parameters_without_gradient_stay_finite():
    zeros = {"kernel": jnp.zeros((2, 2))}
    (after,) = run(OptimizerConfig(), zeros, [zeros])
    np.testing.assert_array_equal(after["kernel"], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_schedule": "cosin"}, "'cosin' is unknown; .*Did you mean 'cosine'"),
        ({"decay": "matrix"}, "'matrix' is unknown; .*Did you mean 'matrices'"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 must be more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate nan must be more than 0"),
        ({"epsilon": 0.0}, "epsilon 0.0 must be more than 0"),
        ({"betas": (0.9, 1.0)}, r"betas \(0.9, 1.0\) must be two numbers in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay -1.0 must be 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps -1 must be 0 or more"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)


def test_a_warm_up_longer_than_a_cosine_run_is_refused():
    config = OptimizerConfig(rate_schedule="cosine", warmup_steps=10)
    with pytest.raises(ValueError, match="num_steps 10: shorten config.optimizer.warmup_steps"):
        make_rate(config, 10)


def transformer_tree(seed):
    """A tree named as a transformer's, with two layers."""
    rng = np.random.default_rng(seed)
    shapes = {
        "token_embed": {"embedding": (9, 6)},
        "head": {"kernel": (6, 9)},
        "layers": {
            "attention": {"qkv": {"kernel": (2, 6, 3, 2, 4)}, "out": {"kernel": (2, 2, 4, 6)}},
            "attention_norm": {"scale": (2, 6)},
            "mlp": {"gate_up": {"kernel": (2, 6, 2, 8)}, "down": {"kernel": (2, 8, 6)}},
        },
    }
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def matrices(name, value):
    """The matrices of a kernel, [n, inputs, outputs]."""
    if name == "qkv":
        return np.moveaxis(value, 2, 1).reshape(6, 6, 8)
    if name == "gate_up":
        return np.moveaxis(value, 2, 1).reshape(4, 6, 8)
    return value.reshape(2, -1, 6)


def test_muon_makes_the_update_of_every_matrix_orthogonal():
    """Singular vectors of the gradient, with singular values near one: the polar factor."""
    config = OptimizerConfig(name="muon", learning_rate=0.5, weight_decay=0.0, clip_norm=0.0)
    params, gradient = transformer_tree(0), transformer_tree(1)
    (after,) = run(config, params, [gradient])
    for module, name in [
        ("attention", "qkv"),
        ("attention", "out"),
        ("mlp", "gate_up"),
        ("mlp", "down"),
    ]:

        def find(tree):
            return matrices(name, np.asarray(tree["layers"][module][name]["kernel"]))  # noqa: B023

        update, slope = find(after) - find(params), find(gradient)
        for one, other in zip(update, slope, strict=True):
            left, _, right = np.linalg.svd(other, full_matrices=False)
            values = left.T @ one @ right.T
            # The rate, times what gives a root mean square of 0.2, down the slope.
            size = -0.5 * 0.2 * max(one.shape) ** 0.5
            diagonal = np.diag(values) / size
            assert 0.6 < diagonal.min() <= diagonal.max() < 1.3
            assert np.abs(values - np.diag(np.diag(values))).max() < 1e-3


def test_muon_leaves_embeddings_head_and_norms_to_adamw():
    settings = dict(learning_rate=0.1, weight_decay=0.3, clip_norm=0.0, betas=(0.8, 0.95))
    params, gradients = transformer_tree(0), [transformer_tree(1), transformer_tree(2)]
    muon = run(OptimizerConfig(name="muon", **settings), params, gradients)[-1]
    adamw = run(OptimizerConfig(**settings), params, gradients)[-1]
    for path in [("token_embed", "embedding"), ("head", "kernel")]:
        np.testing.assert_array_equal(muon[path[0]][path[1]], adamw[path[0]][path[1]])
    np.testing.assert_array_equal(
        muon["layers"]["attention_norm"]["scale"], adamw["layers"]["attention_norm"]["scale"]
    )
    assert not np.allclose(
        muon["layers"]["mlp"]["down"]["kernel"], adamw["layers"]["mlp"]["down"]["kernel"]
    )


def test_muon_decays_matrices():
    config = OptimizerConfig(name="muon", learning_rate=0.5, weight_decay=0.4, clip_norm=0.0)
    params = transformer_tree(0)
    (after,) = run(config, params, [jax.tree.map(np.zeros_like, params)])
    for name, kernel in params["layers"]["mlp"].items():
        decayed = after["layers"]["mlp"][name]["kernel"]
        np.testing.assert_allclose(decayed, 0.8 * kernel["kernel"], rtol=1e-5)


def test_muon_refuses_what_is_no_transformer():
    optimizer = make_optimizer(OptimizerConfig(name="muon"), 10)
    params = {"encoder": {"conv_in": {"kernel": np.zeros((3, 3, 4, 8), np.float32)}}}
    with pytest.raises(ValueError, match=r"cannot train encoder/conv_in/kernel \(3, 3, 4, 8\)"):
        optimizer.init(params)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer.name 'lion'.*adamw"):
        OptimizerConfig(name="lion")
