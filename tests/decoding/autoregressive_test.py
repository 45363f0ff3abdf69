"""The autoregressive decoder, on a model given as a table of conditional probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toy_decoding import Condition

from maskgil_jax.decoding import autoregressive, masked
from maskgil_jax.decoding.autoregressive import AutoregressiveConfig, CausalPredictor, make_spans

pytestmark = pytest.mark.usefixtures("quick_compilation")
CODES, LENGTH = 5, 4


def make_table(seed=0):
    """Logits of the next code for [condition, index, code before], one more row for the first."""
    return np.random.default_rng(seed).normal(0, 1.5, (3, LENGTH, CODES + 1, CODES)).astype("f4")


def table_model(table):
    table = jnp.asarray(table)

    def start(condition, length):
        return table[condition, 0, CODES], Condition(condition)

    def step(codes, index, live, cache):
        return table[cache.condition, index + 1, codes], cache

    return CausalPredictor(1, start, step)


@functools.partial(jax.jit, static_argnames=("program", "count"))
def decode(table, condition, rngs, plan, *, program, count):
    null = jnp.full_like(condition, 2)
    return autoregressive.decode(
        table_model(table), condition, null, rngs, program, plan, count=count
    )


def draw(table, condition, count=LENGTH, seed=0, **settings):
    config = AutoregressiveConfig(**{"guidance_scale": 1.0} | settings)
    condition = jnp.asarray(condition)
    rngs = masked.image_keys(seed, np.arange(len(condition)))
    codes = decode(table, condition, rngs, config.plan(), program=config.program(), count=count)
    return np.asarray(codes)


def expected(table, condition, **settings):
    """Probability of every sequence, in float64."""
    scale = settings.get("guidance_scale", 1.0)
    guided = settings.get("guided_tokens", 0) or LENGTH
    logits = np.asarray(table, np.float64)
    probabilities = np.ones([CODES] * LENGTH)
    for codes in np.ndindex(*probabilities.shape):
        for i, code in enumerate(codes):
            before = codes[i - 1] if i else CODES
            row = logits[condition, i, before]
            if i < guided:
                null = logits[2, i, before]
                row = null + scale * (row - null)
            row = np.exp(row / settings.get("temperature", 1.0))
            probabilities[codes] *= row[code] / row.sum()
    return probabilities


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "guided_tokens": 2},
        {"guidance_scale": 0.0},
    ],
    ids=str,
)
def test_sequences_have_the_probabilities_of_the_chain_rule(settings):
    table, images = make_table(), 20_000
    codes = draw(table, np.ones(images, np.int32), **settings)
    counts = np.bincount(np.ravel_multi_index(codes.T, [CODES] * LENGTH), minlength=CODES**LENGTH)
    wanted = expected(table, 1, **settings).ravel() * images
    often = wanted >= 5
    observed = [*counts[often], counts[~often].sum()]
    total = [*wanted[often], wanted[~often].sum()]
    assert stats.chisquare(observed, np.array(total) * images / sum(total)).pvalue > 1e-4


def test_the_most_probable_code_is_taken_at_temperature_zero():
    table = make_table()
    codes = draw(table, [0, 1], temperature=0.0)
    for condition, row in enumerate(codes):
        before = CODES
        for i, code in enumerate(row):
            assert code == table[condition, i, before].argmax()
            before = code


def test_filters_leave_out_unlikely_codes():
    table = make_table()
    best = draw(table, [0] * 50, temperature=0.0)
    np.testing.assert_array_equal(draw(table, [0] * 50, top_k=1), best)
    np.testing.assert_array_equal(draw(table, [0] * 50, top_p=1e-6), best)
    few = draw(table, [0] * 400, top_k=2)[:, 0]
    assert set(few) == set(np.argsort(table[0, 0, CODES])[-2:])


def test_an_image_depends_on_its_own_key_alone():
    table = make_table()
    many = draw(table, [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(draw(table, [0, 1]), many[:2])
    assert (draw(table, [0, 1, 0, 1, 0], seed=1) != many).any()


def test_the_first_tokens_do_not_depend_on_how_many_follow():
    table = make_table()
    np.testing.assert_array_equal(draw(table, [0, 1, 0], count=2), draw(table, [0, 1, 0])[:, :2])
    assert draw(table, [0], count=1).shape == (1, 1)


def test_what_is_no_number_is_no_code_and_nothing_follows():
    table = make_table()
    table[0, 2] = np.nan
    codes = draw(table, [0, 1])
    assert (codes[0, :2] >= 0).all()
    np.testing.assert_array_equal(codes[0, 2:], [-1, -1])
    assert (codes[1] >= 0).all()


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 200, 256])
@pytest.mark.parametrize("prefix", [1, 120])
@pytest.mark.parametrize("guided", [0, 1, 40])
def test_spans_cover_every_token_once_and_read_what_is_filled(count, prefix, guided):
    guided = min(guided, count)
    spans = make_spans(count, prefix, guided)
    assert [i for span in spans for i in range(span.first, span.end)] == list(range(1, count))
    for span in spans:
        for i in range(span.first, span.end):
            assert prefix + i <= span.live <= prefix + count
            assert span.live - (prefix + i) < 64
            assert span.guided == (i < guided)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 is out of range"),
        ({"temperature": 1e-9}, "too small to divide by"),
        ({"guidance_scale": float("inf")}, "guidance_scale inf is out of range"),
        ({"top_k": -1}, "top_k -1 is out of range"),
        ({"guided_tokens": -2}, "guided_tokens -2 is out of range"),
        ({"top_p": 0.0}, "top_p 0.0 is out of range"),
        ({"temperature": 0.0, "top_k": 3}, "top_k 3 has no meaning at temperature 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoregressiveConfig(**settings)
