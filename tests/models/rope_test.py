import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from maskgil_jax.models import rope

HEAD_DIM = 8


def rotated(table, x):
    return np.asarray(rope.apply_rope(jnp.asarray(x, jnp.float32), table))


def random_heads(length, seed=0):
    return np.random.default_rng(seed).standard_normal((2, length, 3, HEAD_DIM)).astype(np.float32)


@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (5, 2), (1, 7)])
def test_rectangular_grids_rotate_rows_and_columns_separately(grid):
    config = references.tiny_config(width=2 * HEAD_DIM, grid_size=grid)
    x = random_heads(1 + grid[0] * grid[1])
    turns = references.rotations(config, *grid)
    table = config.rope_table()
    np.testing.assert_allclose(rotated(table, x), references.rotate(x, turns), atol=1e-5)
    np.testing.assert_array_equal(config.rope_table(grid), table)


def test_one_dimension_counts_positions():
    config = references.tiny_config(width=2 * HEAD_DIM, rope="1d", grid_size=(2, 6))
    turns = references.rotations(config, 2, 6)
    x = random_heads(13)
    np.testing.assert_allclose(
        rotated(config.rope_table(), x), references.rotate(x, turns), atol=1e-5
    )


def test_only_the_offset_of_two_tokens_matters():
    q, k = random_heads(30, seed=1)[:1], random_heads(30, seed=2)[:1]
    q, k = np.broadcast_to(q[:, :1], q.shape), np.broadcast_to(k[:, :1], k.shape)
    table = rope.rope_2d((5, 6), HEAD_DIM)
    scores = np.einsum("blhd,bshd->ls", rotated(table, q), rotated(table, k)).reshape(5, 6, 5, 6)
    np.testing.assert_allclose(scores[1, 2, 3, 5], scores[0, 0, 2, 3], atol=1e-5)
    np.testing.assert_allclose(scores[4, 5, 0, 3], scores[4, 3, 0, 1], atol=1e-5)
    assert abs(scores[1, 2, 3, 5] - scores[1, 2, 5 - 1, 4]) > 1e-2


@pytest.mark.parametrize(("kind", "factor"), [("identity", 1), ("zero", 0)])
def test_condition_rows_leave_or_erase_their_token(kind, factor):
    x = random_heads(4)
    np.testing.assert_array_equal(rotated(rope.condition_rows(4, HEAD_DIM, kind), x), factor * x)


def test_diagonal_rows_are_those_of_the_grid():
    grid = rope.rope_2d((6, 6), HEAD_DIM, 100.0).reshape(6, 6, HEAD_DIM // 2, 2)
    rows = rope.diagonal_rows(4, 6, (6, 6), HEAD_DIM, 100.0)
    np.testing.assert_array_equal(rows, grid[range(4), range(4)])
    # Twice as many tokens stand twice as densely, on each axis of a grid for itself.
    dense = rope.diagonal_rows(12, 12, (6, 12), HEAD_DIM, 100.0)
    np.testing.assert_allclose(dense[:8:2, :2], rows[:, :2], atol=1e-6)
    np.testing.assert_allclose(dense[:4, 2:], rows[:, 2:], atol=1e-6)


def test_the_type_of_the_input_is_kept():
    x = jnp.ones((1, 4, 1, HEAD_DIM), jnp.bfloat16)
    assert jax.eval_shape(lambda: rope.apply_rope(x, rope.rope_1d(4, HEAD_DIM))).dtype == x.dtype


def test_what_cannot_be_rotated_is_refused():
    with pytest.raises(ValueError, match="divisible by 4, not 6"):
        rope.rope_2d((2, 2), 6)
    with pytest.raises(ValueError, match="'table' has no rows; allowed here"):
        rope.condition_rows(1, HEAD_DIM, "table")


def test_a_spread_grid_has_the_positions_of_its_span():
    plain, spread = rope.rope_2d((4, 4), 8), rope.rope_2d((8, 2), 8, span=(4, 4))
    spread = spread.reshape(8, 2, 4, 2)
    # Every other row and every column fall on cells of the span: rows 0, ½, 1, …; columns 0, 2.
    np.testing.assert_allclose(spread[::2], plain.reshape(4, 4, 4, 2)[:, ::2], atol=1e-6)
    between = np.cos(0.5), np.sin(0.5)
    np.testing.assert_allclose(spread[1, 0, 0], between, atol=1e-6)
    np.testing.assert_array_equal(rope.rope_2d((4, 4), 8, span=(4, 4)), plain)


def test_halves_are_the_same_turns_of_other_pairs():
    x, table = random_heads(5), rope.rope_1d(5, HEAD_DIM)
    # Channels 0, d/2, 1, d/2 + 1, … are neighbours then.
    order = np.arange(HEAD_DIM).reshape(2, -1).T.reshape(-1)
    halves = np.asarray(rope.apply_rope(jnp.asarray(x), table, "halves"))
    np.testing.assert_allclose(halves[..., order], rotated(table, x[..., order]), atol=1e-6)
    assert np.abs(halves - rotated(table, x)).max() > 0.1
