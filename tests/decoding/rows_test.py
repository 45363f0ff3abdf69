"""Rows of codes: what is forced stands where it must, whatever the logits are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_decoding import Condition

from maskgil_jax.decoding import autoregressive, masked, rows

CODES = 6


def decode(forced, counted=None, count=None, **options):
    """Draw from logits that favour one code after the other, and change without a condition."""

    def logits(tokens, index):
        if counted is not None:
            jax.debug.callback(lambda b: counted.append(int(b)), len(tokens))
        return jax.nn.one_hot((index + tokens) % CODES, CODES) * 3.0

    def start(condition, length):
        return logits(condition, 0), Condition(condition)

    def step(tokens, index, live, cache):
        return logits(tokens, index + 1), cache

    config = autoregressive.AutoregressiveConfig(**{"guidance_scale": 1.0, **options})
    return np.asarray(
        autoregressive.decode(
            autoregressive.CausalPredictor(1, start, step),
            jnp.arange(3),
            jnp.zeros(3, jnp.int32),
            masked.image_keys(0, np.arange(3)),
            config.program(),
            config.plan(),
            count=len(forced) if count is None else count,
            forced=forced,
        )
    )


def test_a_row_ends_where_it_must():
    assert rows.force_rows(1, 3, 9).tolist() == [-1]
    assert rows.force_rows(3, 3, 9).tolist() == [-1, -1, -1]
    assert rows.force_rows(4, 3, 9).tolist() == [-1, -1, -1, 9, -1]
    assert rows.force_rows(6, 2, 9).tolist() == [-1, -1, 9, -1, -1, 9, -1, -1]
    assert rows.force_rows(2, 1, 9).tolist() == [-1, 9, -1]
    with pytest.raises(ValueError, match="count 0 and columns 3 must be at least 1"):
        rows.force_rows(0, 3, 9)


def test_codes_are_what_was_drawn():
    forced = rows.force_rows(4, 2, 9)
    tokens = np.array([[1, 2, 9, 3, 4]])
    assert rows.take_codes(tokens, forced).tolist() == [[1, 2, 3, 4]]


def test_forced_tokens_are_given_and_read():
    forced = np.array([-1, -1, CODES, -1, 2, -1], np.int32)
    greedy = {"temperature": 0.0}
    found = decode(forced, **greedy)
    np.testing.assert_array_equal(found[:, [2, 4]], [[CODES, 2]] * 3)
    # What stands behind a forced token follows from it.
    np.testing.assert_array_equal(found[:, 3], [(3 + CODES) % CODES] * 3)
    np.testing.assert_array_equal(found[:, 5], [(5 + 2) % CODES] * 3)
    free = decode(np.full(6, -1, np.int32), **greedy)
    np.testing.assert_array_equal(found[:, :2], free[:, :2])
    begins = decode(np.array([4, -1], np.int32), **greedy)
    np.testing.assert_array_equal(begins, [[4, 5]] * 3)


def test_none_is_forced_by_default():
    same = decode(np.full(5, -1, np.int32))
    np.testing.assert_array_equal(decode(None, count=5), same)
    with pytest.raises(ValueError, match="3 tokens are forced or drawn; expected: 2"):
        decode(np.full(3, -1, np.int32), count=2)


@pytest.mark.parametrize(("tokens", "doubled"), [(0, 6), (1, 1), (2, 2), (3, 4), (4, 5), (5, 6)])
def test_guidance_counts_what_is_drawn(tokens, doubled):
    counted = []
    forced = rows.force_rows(4, 2, CODES)[:5]
    forced = np.append(forced, np.int32(-1))
    decode(forced, counted, guidance_scale=2.0, guided_tokens=tokens)
    jax.effects_barrier()
    assert sorted(counted, reverse=True) == [6] * doubled + [3] * (6 - doubled)
