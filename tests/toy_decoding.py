"""Decode images of a small model given as a table, and compare frequencies with probabilities."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from maskgil_jax.decoding import masked

# As many tokens in every step, as nearly as whole numbers allow; no guidance, no noise.
EVEN = dict(
    schedule="linear", schedule_form="mask_ratio", guidance_scale=1.0, gumbel_temperature=0.0
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """A cache that is nothing but the condition, as long as anyone likes."""

    condition: Any

    def grow(self, length):
        return self


def log(probabilities):
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probabilities, np.float64)).astype(np.float32)


def independent_model(logits):
    """A model whose logits [l, k] depend on nothing; the mask token's are enormous."""
    padded = np.pad(np.asarray(logits, np.float32), ((0, 0), (0, 1)), constant_values=1e9)
    return lambda tokens, _: jnp.broadcast_to(padded, (len(tokens), *padded.shape))


# Compiling takes far longer than running, so little is spent on it.
@functools.partial(
    jax.jit,
    static_argnames=("logits_fn", "sampler", "mask", "grid_size"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def _decode(tokens, rngs, *, logits_fn, sampler, mask, grid_size):
    return masked.decode(
        logits_fn,
        tokens,
        None,
        None,
        rngs,
        sampler,
        mask_token_id=mask,
        grid_size=grid_size,
        return_trace=True,
    )


def decode(logits_fn, tokens, sampler, *, mask, grid_size=None, first=0, seed=0):
    """Tokens [b, l] and their history [t, b, l] in NumPy, of images `first`, `first` + 1, …"""
    rngs = masked.image_keys(seed, np.arange(first, first + len(tokens)))
    tokens = jnp.asarray(tokens, jnp.int32)
    options = dict(logits_fn=logits_fn, sampler=sampler, mask=mask, grid_size=grid_size)
    result, trace = _decode(tokens, rngs, **options)
    return np.asarray(result), np.asarray(trace.tokens)


def blank(images, length, mask):
    return np.full((images, length), mask, np.int32)


def assert_counts_follow(counts, probabilities):
    """Hold counts against probabilities of the same shape, which sum to 1, by chi-square."""
    counts, probabilities = np.ravel(counts), np.ravel(probabilities)
    assert abs(np.sum(probabilities) - 1) < 1e-9
    possible = probabilities > 0
    np.testing.assert_array_equal(counts[~possible], 0)
    expected = counts.sum() * probabilities[possible]
    assert expected.min() >= 5, "too few images for the test to mean something"
    if len(expected) > 1:
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-4


def assert_codes_follow(codes, probabilities):
    counts = np.bincount(np.ravel(codes), minlength=len(probabilities))
    assert_counts_follow(counts, np.asarray(probabilities, np.float64))


def count_images(tokens, codes):
    """How many images [b, l] hold each combination of codes: [codes] * l."""
    shape = (codes,) * tokens.shape[1]
    return np.bincount(np.ravel_multi_index(tuple(tokens.T), shape), minlength=codes ** len(shape))
