import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from toy_decoding import EVEN, assert_codes_follow, blank, decode, independent_model, log

from maskgil_jax.decoding import filters
from maskgil_jax.decoding.masked import SamplerConfig

PROBABILITIES = np.array([0.06, 0.3, 0.1, 0.2, 0.15, 0.05, 0.08, 0.04, 0.02])
MASK = len(PROBABILITIES)


def random_logits(size, *, ties, forbidden):
    """Logits [20, 4, size], with equal ones and impossible ones if wished."""
    rng = np.random.default_rng(size)
    logits = 2 * rng.standard_normal((20, 4, size))
    if ties:
        logits = np.round(logits)
    if forbidden:
        logits[rng.random(logits.shape) < 0.3] = -np.inf
        logits[..., size // 2] = 1
    return logits.astype(np.float32)


def check_that_the_rest_is_untouched(filtered, logits):
    """Return which codes stay, after a look at their values."""
    kept = np.isfinite(filtered)
    np.testing.assert_array_equal(filtered[kept], logits[kept])
    assert np.all(np.isneginf(filtered[~kept]))
    return kept


def more_likely(logits):
    """Booleans [..., code, other]: whether the other one is more likely."""
    return logits[..., None, :] > logits[..., :, None]


LOGITS = pytest.mark.parametrize(
    ("size", "ties", "forbidden"),
    [(1, False, False), (9, True, True), (64, False, True), (64, True, False)],
)


@LOGITS
def test_top_k_keeps_the_codes_that_fewer_than_k_exceed(size, ties, forbidden):
    logits = random_logits(size, ties=ties, forbidden=forbidden)
    keep = jax.jit(filters.keep_top_k, static_argnums=1)
    for top_k in sorted({1, 2, 5, size - 1, size} & set(range(1, size + 1))):
        filtered = np.asarray(keep(logits, top_k))
        kept = check_that_the_rest_is_untouched(filtered, logits)
        expected = (more_likely(logits).sum(-1) < top_k) & np.isfinite(logits)
        np.testing.assert_array_equal(kept, expected)


@LOGITS
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 1 - 1e-4, 1 - 1e-9])
def test_top_p_keeps_the_codes_that_less_than_p_exceeds(size, ties, forbidden, top_p):
    logits = random_logits(size, ties=ties, forbidden=forbidden)
    filtered = np.asarray(jax.jit(filters.keep_top_p, static_argnums=1)(logits, top_p))
    kept = check_that_the_rest_is_untouched(filtered, logits)
    probability = references.softmax(logits.astype(np.float64))
    before = np.sum(more_likely(logits) * probability[..., None, :], -1)
    # Float32 sums cannot tell what lies nearer to p than this.
    clear = (np.abs(before - top_p) > 2e-6) | (before == 0)
    assert clear.mean() > 0.5
    expected = (before < top_p) & np.isfinite(logits)
    np.testing.assert_array_equal(kept[clear], expected[clear])
    assert np.all(np.sum(probability * kept, -1) > top_p - 2e-6)


def test_of_equal_codes_top_p_keeps_all():
    filtered = filters.keep_top_p(jnp.zeros((1, 1, 8)), 0.3)
    np.testing.assert_array_equal(filtered, np.zeros((1, 1, 8)))


def expected_probabilities(temperature=1.0, top_k=0, top_p=1.0):
    """Temper, then keep k, then keep p, by sorting; the probabilities are all different."""
    weights = PROBABILITIES ** (1 / temperature)
    falling = np.argsort(-weights)
    weights[falling[top_k or MASK :]] = 0
    weights /= weights.sum()
    needed = 1 + np.searchsorted(np.cumsum(weights[falling]), top_p - 1e-12)
    weights[falling[needed:]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 4}, 4),
        ({"top_p": 0.28}, 1),
        ({"top_p": 0.7}, 4),
        ({"top_p": 0.97}, 8),
        # Of the three left by top-k the first two hold more than 0.7; of all, the first four do.
        ({"top_k": 3, "top_p": 0.7}, 2),
        ({"temperature": 2.0, "top_p": 0.7}, 5),
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.9}, 3),
    ],
)
def test_codes_are_drawn_from_what_is_left(changes, left):
    probabilities = expected_probabilities(**changes)
    assert np.sum(probabilities > 0) == left
    model = independent_model(log(np.tile(PROBABILITIES, (2500, 1))))
    sampler = SamplerConfig(num_steps=1, guidance_scale=1.0, **changes)
    codes, _ = decode(model, blank(8, 2500, MASK), sampler, mask=MASK)
    assert_codes_follow(codes, probabilities)


def test_the_filters_bear_on_confidence_too():
    # Two codes of the first position are left, 8 : 7, and one of the second, which is then sure.
    model = independent_model(log([[0.4, 0.35, 0.25], [0.45, 0.28, 0.27]]))
    sampler = SamplerConfig(num_steps=2, top_p=0.42, **EVEN)
    codes, history = decode(model, blank(500, 2, 3), sampler, mask=3)
    np.testing.assert_array_equal(history[0], [[3, 0]] * 500)
    assert_codes_follow(codes[:, 0], [8 / 15, 7 / 15, 0])


@pytest.mark.parametrize("top_k", [10, 1000])
def test_top_k_of_more_than_the_codes_is_refused(top_k):
    sampler = SamplerConfig(num_steps=1, guidance_scale=1.0, top_k=top_k)
    model = independent_model(log(PROBABILITIES[None]))
    with pytest.raises(ValueError, match=f"top_k {top_k} is out of range; allowed: 1 to 9"):
        decode(model, blank(1, 1, MASK), sampler, mask=MASK)


@pytest.mark.parametrize("num_steps", [1, 4, 15])
def test_temperature_falls_to_its_setting(num_steps):
    sampler = SamplerConfig(num_steps=num_steps, temperature=0.5, temperature_annealing=0.8)
    expected = [0.5 + 0.8 * (1 - (i + 1) / num_steps) for i in range(num_steps)]
    np.testing.assert_allclose(sampler.temperatures(), expected, rtol=1e-6)
    assert sampler.temperatures()[-1] == 0.5


def test_each_step_draws_at_its_temperature():
    model = independent_model(log(np.tile(PROBABILITIES, (400, 1))))
    # In a random order: by confidence, the revealed codes would be the likelier ones.
    sampler = SamplerConfig(
        num_steps=4, order="random", temperature=0.5, temperature_annealing=0.8, **EVEN
    )
    _, history = decode(model, blank(100, 400, MASK), sampler, mask=MASK)
    before = np.full_like(history[0], MASK)
    for after, temperature in zip(history, (1.1, 0.9, 0.7, 0.5), strict=True):
        revealed = after[after != before]
        assert len(revealed) == 100 * 100
        assert_codes_follow(revealed, expected_probabilities(temperature))
        before = after


def test_the_most_likely_code_stays_however_small_top_p_is():
    kept = np.isfinite(filters.keep_top_p(jnp.array([[[0.0, 1.0, 2.0]]]), 1e-40))
    np.testing.assert_array_equal(kept, [[[False, False, True]]])
