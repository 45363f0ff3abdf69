"""What the decoder draws, as a whole, against probabilities that are enumerated."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import references
from toy_decoding import (
    EVEN,
    assert_codes_follow,
    assert_counts_follow,
    blank,
    count_images,
    decode,
    independent_model,
    log,
)

from maskgil_jax.decoding.masked import SamplerConfig

UNEVEN = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4], [0.25, 0.15, 0.6]])
# Where all codes that can be drawn are equally probable, confidence does not depend on the code.
EVEN_ODDS = np.array([[0.5, 0.5, 0], [1, 1, 1], [0, 0.5, 0.5], [1, 1, 1]])
EVEN_ODDS /= EVEN_ODDS.sum(1, keepdims=True)

UNBIASED = [
    ("random", "none", "random", 3),
    ("random", "cap", "random", 4),
    ("random", "rescale", "random", 3),
    ("halton", "none", "random", 3),
    ("halton", "cap", "random", 3),
    ("halton", "rescale", "random", 4),
]
BY_CONFIDENCE = [
    ("confidence", "none", "random", 4),
    ("confidence", "rescale", "confidence", 4),
    ("random", "cap", "confidence", 4),
]


@pytest.mark.parametrize(
    ("probabilities", "order", "kind", "choice", "num_steps"),
    [(UNEVEN, *case) for case in UNBIASED] + [(EVEN_ODDS, *case) for case in BY_CONFIDENCE],
)
def test_independent_tokens_stay_so(probabilities, order, kind, choice, num_steps):
    sampler = SamplerConfig(
        num_steps=num_steps,
        order=order,
        halton_roll=True,
        remasking=kind,
        remasking_strength=0.7,
        remasking_choice=choice,
        **EVEN | {"gumbel_temperature": 1.0},
    )
    model = independent_model(log(probabilities))
    result, _ = decode(model, blank(12000, 4, 3), sampler, mask=3, grid_size=(2, 2))
    for position in range(4):
        assert_codes_follow(result[:, position], probabilities[position])
    joint = np.einsum("a,b,c,d->abcd", *probabilities)
    assert_counts_follow(count_images(result, 3), joint)


def table_model(table):
    """A model whose logits for tokens (a, b, …) are table[a, b, …], of shape [l, codes]."""
    table = np.pad(table.astype(np.float32), [(0, 0)] * (table.ndim - 1) + [(0, 1)])
    return lambda tokens, _: jnp.asarray(table)[tuple(tokens.T)]


def test_one_token_per_step_is_ancestral_sampling():
    # The two conditionals contradict each other, so that the order matters.
    table = 1.5 * np.random.default_rng(0).standard_normal((4, 4, 2, 3))
    p, mask = references.softmax(table), 3
    first, second = np.zeros((3, 3)), np.zeros((3, 3))
    for a, b in itertools.product(range(3), repeat=2):
        first[a, b] = p[mask, mask, 0, a] * p[a, mask, 1, b]
        second[a, b] = p[mask, mask, 1, b] * p[mask, b, 0, a]
    assert np.abs(first - second).max() > 0.03
    model = table_model(table)
    # On a grid of one row and two columns, Halton's first point is 1/2, 1/3: the left cell.
    for order, joint in [("random", (first + second) / 2), ("halton", first)]:
        sampler = SamplerConfig(num_steps=2, order=order, **EVEN)
        result, _ = decode(model, blank(20000, 2, mask), sampler, mask=mask, grid_size=(1, 2))
        assert_counts_follow(count_images(result, 3), joint)


def test_confidence_keeps_the_more_probable_of_two_draws():
    table = 1.5 * np.random.default_rng(1).standard_normal((4, 4, 2, 3))
    p, mask = references.softmax(table), 3
    joint = np.zeros((3, 3))
    for a, b in itertools.product(range(3), repeat=2):
        first, second = p[mask, mask, 0, a], p[mask, mask, 1, b]
        if first > second:
            joint[a] += first * second * p[a, mask, 1]
        else:
            joint[:, b] += first * second * p[mask, b, 0]
    sampler = SamplerConfig(num_steps=2, order="confidence", **EVEN)
    result, _ = decode(table_model(table), blank(20000, 2, mask), sampler, mask=mask)
    assert_counts_follow(count_images(result, 3), joint)


@pytest.mark.parametrize("kind", ["cap", "rescale"])
def test_a_token_taken_back_is_drawn_again_given_the_others(kind):
    # Step 0 reveals one of three tokens; step 1 takes it back and reveals the two others; step 2
    # draws it anew. Had it not been taken back, it would not know of one of them.
    table = 2 * np.random.default_rng(2).standard_normal((3, 3, 3, 3, 2))
    p, mask = references.softmax(table), 2
    joint = np.zeros((2, 2, 2))
    for start, code in itertools.product(range(3), range(2)):
        alone = [mask] * 3
        alone[start] = code
        for final in itertools.product(range(2), repeat=3):
            without = list(final)
            without[start] = mask
            chance = p[mask, mask, mask][start, code] * p[tuple(without)][start, final[start]]
            for other in {0, 1, 2} - {start}:
                chance *= p[tuple(alone)][other, final[other]]
            joint[final] += chance / 3
    sampler = SamplerConfig(
        num_steps=3, order="random", remasking=kind, remasking_strength=1.0, **EVEN
    )
    result, _ = decode(table_model(table), blank(20000, 3, mask), sampler, mask=mask)
    assert_counts_follow(count_images(result, 2), joint)
