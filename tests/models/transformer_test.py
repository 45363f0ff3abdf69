import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgil_jax.models import rope
from maskgil_jax.models.cached import look_back
from maskgil_jax.models.transformer import Transformer, TransformerConfig

LENGTH = 6
CONFIG = dict(num_layers=2, width=16, num_heads=2, mlp_width=32)


def influence(mask):
    """How strongly output i moves with input j: Jacobian norms [l, l] of a random stack."""
    module = Transformer(TransformerConfig(**CONFIG))
    table = rope.rope_1d(LENGTH, 8)
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, 16))
    variables = jax.jit(module.init)(jax.random.key(1), x, table, mask)
    jacobian = jax.jit(jax.jacrev(lambda x: module.apply(variables, x, table, mask)))(x)
    return np.sqrt((np.asarray(jacobian)[0, :, :, 0] ** 2).sum((1, 3)))


def test_without_a_mask_every_position_sees_every_other():
    assert influence(None).min() > 1e-6


def test_a_causal_mask_looks_back_and_never_ahead():
    seen = influence(look_back(0, LENGTH, LENGTH, 1))
    ahead = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    np.testing.assert_array_equal(seen[ahead], 0)
    assert seen[~ahead].min() > 1e-6


def test_a_mask_per_sequence_hides_what_it_names():
    module = Transformer(TransformerConfig(**CONFIG))
    table = rope.rope_1d(LENGTH, 8)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 16))
    mask = jnp.ones((2, LENGTH, LENGTH), bool).at[1, :, 4:].set(False)
    variables = jax.jit(module.init)(jax.random.key(1), x, table, mask)
    apply = jax.jit(module.apply)
    y = apply(variables, x, table, mask)
    changed = apply(variables, x.at[:, 5].add(1.0), table, mask)
    moved = np.abs(np.asarray(changed - y)).max(-1)
    assert moved[0].min() > 1e-6
    np.testing.assert_array_equal(moved[1, :5], 0)


def test_every_layer_draws_its_own_dropout():
    module = Transformer(TransformerConfig(**CONFIG | {"num_layers": 8, "dropout": 0.5}))
    table = rope.rope_1d(LENGTH, 8)
    # One channel carries a signal: another stays zero only if each layer drops it twice.
    x = jnp.zeros((4, LENGTH, 16)).at[..., 0].set(1.0)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    y, _ = jax.jit(lambda: module.init_with_output(keys, x, table, None, True))()
    assert np.mean(np.asarray(y)[..., 1:] == 0) < 0.01


def test_the_compiled_program_does_not_grow_with_depth():
    def program_size(num_layers):
        module = Transformer(TransformerConfig(**CONFIG | {"num_layers": num_layers}))
        x, table = jnp.zeros((1, LENGTH, 16)), rope.rope_1d(LENGTH, 8)
        variables = jax.eval_shape(module.init, jax.random.key(0), x, table)
        return len(jax.jit(module.apply).lower(variables, x, table).as_text())

    assert program_size(24) < 1.05 * program_size(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers 0 must be at least 1"),
        ({"scan_unroll": 0}, "scan_unroll 0 must be at least 1"),
        ({"num_heads": 3}, "width 16 / num_heads 3 must be a whole number"),
        ({"num_heads": 16}, "width 16 / num_heads 16 must be an even number"),
        ({"qk_norm": "layr"}, "qk_norm 'layr' is unknown; allowed: .*Did you mean 'layer'"),
        ({"post_norm": "rm"}, "post_norm 'rm' .*Did you mean 'rms'"),
        ({"remat": "dot"}, "remat 'dot' .*Did you mean 'dots'"),
        ({"dtype": "float16"}, "dtype 'float16' .*Did you mean 'bfloat16'"),
        ({"norm_eps": 0.0}, "norm_eps 0.0 must be more than 0"),
        ({"dropout": 1.0}, r"dropout 1.0 is out of range; allowed: \[0, 1\)"),
        ({"attention": "cudnn"}, "'cudnn' needs dtype 'bfloat16'"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**CONFIG | changes)
