import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toy_decoding import EVEN, assert_counts_follow, blank, decode, independent_model, log

from maskgil_jax.decoding import remasking
from maskgil_jax.decoding.masked import SamplerConfig

MASK, LENGTH = 5, 12


@functools.cache
def dependent_model():
    """Logits that depend on the position and on all tokens."""
    place, word = (jax.random.normal(jax.random.key(i), (LENGTH, MASK + 1)) for i in range(2))

    def logits_fn(tokens, _):
        context = jnp.mean(word[tokens], axis=1, keepdims=True)
        return (2 * place[None] + context).at[..., MASK].set(1e9)

    return logits_fn


def start_tokens():
    rng = np.random.default_rng(0)
    unknown = [LENGTH, 7, 1, 0] * 8
    tokens = rng.integers(0, MASK, (len(unknown), LENGTH))
    for row, count in zip(tokens, unknown, strict=True):
        row[rng.permutation(LENGTH)[:count]] = MASK
    return tokens


def remask(tokens, first=0, **changes):
    sampler = SamplerConfig(num_steps=6, guidance_scale=1.0, **changes)
    return decode(dependent_model(), tokens, sampler, mask=MASK, grid_size=(3, 4), first=first)


def taken_back(history):
    """Booleans [t - 1, b, l]: decoded after one step and masked after the next."""
    return (history[:-1] != MASK) & (history[1:] == MASK)


@pytest.mark.parametrize("choice", remasking.CHOICES)
@pytest.mark.parametrize("kind", ["cap", "rescale"])
def test_tokens_are_taken_back_and_the_schedule_is_kept(kind, choice):
    tokens = start_tokens()
    _, plain = remask(tokens)
    result, history = remask(
        tokens, remasking=kind, remasking_strength=0.5, remasking_choice=choice
    )
    np.testing.assert_array_equal((history == MASK).sum(-1), (plain == MASK).sum(-1))
    np.testing.assert_array_equal(result, history[-1])
    assert np.all((result >= 0) & (result < MASK))
    known = tokens != MASK
    np.testing.assert_array_equal(history[:, known], np.tile(tokens[known], (6, 1)))
    # Apart from being taken back, a decoded token does not change.
    stays = (history[:-1] != MASK) & (history[1:] != MASK)
    np.testing.assert_array_equal(history[1:][stays], history[:-1][stays])
    step, image, position = np.nonzero(taken_back(history))
    assert len(step) > 20
    # The schedule leaves nothing of the single unknown token for a step to take back.
    assert set((tokens[image] == MASK).sum(-1)) == {LENGTH, 7}
    redrawn = history[step, image, position] != result[image, position]
    assert 0 < np.sum(redrawn) < len(redrawn)


@pytest.mark.parametrize(("order", "kind"), [("confidence", "cap"), ("halton", "rescale")])
def test_remasking_of_no_strength_is_none(order, kind):
    tokens = start_tokens()
    _, without = remask(tokens, order=order)
    _, history = remask(tokens, order=order, remasking=kind, remasking_strength=0.0)
    np.testing.assert_array_equal(history, without)


def test_images_do_not_depend_on_the_batch_they_are_drawn_in():
    changes = dict(remasking="cap", remasking_strength=0.5, remasking_choice="confidence")
    _, together = remask(start_tokens(), **changes)
    _, part = remask(start_tokens()[4:7], first=4, **changes)
    np.testing.assert_array_equal(part, together[:, 4:7])


# Of 12 tokens four steps reveal 3 each. After step 0, 1, 2, 3 decoded are 3, 6, 9, 12 and left
# 9, 6, 3, 0. So step 1 finds 3 decoded and leaves 6, step 2 finds 6 and leaves 3, step 3 leaves 0.
@pytest.mark.parametrize(
    ("kind", "strength", "means"),
    [
        ("cap", 0.1, [0.3, 0.6, 0]),
        ("cap", 0.7, [2.1, 3, 0]),
        ("rescale", 0.45, [1.35, 1.35, 0]),
        ("rescale", 0.7, [2.1, 2.1, 0]),
        ("rescale", 1.0, [3, 3, 0]),
    ],
)
def test_as_many_are_taken_back_as_the_strength_says(kind, strength, means):
    images = 4000
    sampler = SamplerConfig(
        num_steps=4, order="random", remasking=kind, remasking_strength=strength, **EVEN
    )
    model = independent_model(np.zeros((LENGTH, MASK)))
    _, history = decode(model, blank(images, LENGTH, MASK), sampler, mask=MASK)
    np.testing.assert_array_equal((history[:, 0] == MASK).sum(-1), [9, 6, 3, 0])
    for counts, mean in zip(taken_back(history).sum(-1), means, strict=True):
        below = int(np.floor(mean))
        # Rounded at random to one of the two whole numbers around the mean.
        more, share = np.sum(counts == below + 1), mean - below
        assert np.sum(counts == below) + more == images
        if share == 0:
            assert more == 0
        else:
            z = (more - images * share) / np.sqrt(images * share * (1 - share))
            assert abs(z) < stats.norm.isf(5e-5)


def test_expected_numbers_of_a_small_case():
    decoded, left = jnp.array([0, 2, 5, 8, 8]), jnp.array([9, 7, 4, 1, 0])
    expected = {
        ("cap", 0.25): [0, 0.5, 1.25, 1, 0],
        ("rescale", 0.25): [0, 0.5, 1, 0.25, 0],
        ("cap", 1.0): [0, 2, 4, 1, 0],
        ("rescale", 1.0): [0, 2, 4, 1, 0],
        ("cap", 0.0): [0] * 5,
        ("rescale", 0.0): [0] * 5,
    }
    for (kind, strength), numbers in expected.items():
        actual = remasking.expected_count(kind, strength, decoded, left)
        np.testing.assert_allclose(actual, numbers)


@pytest.mark.parametrize(("choice", "odds"), [("random", 1.0), ("confidence", np.exp(0.9 - 0.1))])
def test_of_two_tokens_the_less_probable_is_taken_back(choice, odds):
    # Four steps, one token each: step 2 finds two decoded, leaves one, and takes one back.
    sampler = SamplerConfig(
        num_steps=4,
        order="random",
        remasking="cap",
        remasking_strength=0.5,
        remasking_choice=choice,
        **EVEN,
    )
    model = independent_model(log([[0.9, 0.1]] * 4))
    _, history = decode(model, blank(12000, 4, 2), sampler, mask=2)
    before, after = history[1], history[2]
    taken = (before != 2) & (after == 2)
    assert np.all(taken.sum(1) == 1)
    codes = np.sort(before, axis=1)[:, :2]
    unlike, taken_code = codes[:, 0] != codes[:, 1], before[taken]
    assert np.sum(unlike) > 1500
    rare = int(np.sum(taken_code[unlike] == 1))
    share = odds / (1 + odds)
    assert stats.binomtest(rare, int(np.sum(unlike)), share).pvalue > 1e-4
    # Of two equally probable ones neither place is preferred.
    alike = before[~unlike] != 2
    first = np.argmax(taken[~unlike], axis=1) == np.argmax(alike, axis=1)
    assert stats.binomtest(int(np.sum(first)), len(first), 0.5).pvalue > 1e-4


@pytest.mark.parametrize("choice", remasking.CHOICES)
def test_several_are_taken_back_one_after_another_without_replacement(choice):
    images, probability = 8000, np.array([0.95, 0.7, 0.4, 0.02])
    eligible = np.tile([True, False, True, True, False, True], (images, 1))
    log_prob = np.zeros((images, 6), np.float32)
    log_prob[eligible] = np.tile(np.log(probability), images)
    draw = jax.jit(remasking.draw_remasked, static_argnames=("kind", "strength", "choice"))
    taken = draw(
        jax.random.split(jax.random.key(0), images),
        jnp.asarray(eligible),
        jnp.asarray(log_prob),
        jnp.full(images, 5),
        kind="cap",
        strength=0.5,
        choice=choice,
    )
    assert not np.any(taken & ~eligible)
    taken = np.asarray(taken)[:, [0, 2, 3, 5]]
    weight = np.exp(-probability) if choice == "confidence" else np.ones(4)
    counts, expected = [], []
    for a, b in itertools.combinations(range(4), 2):
        counts.append(np.sum(taken[:, a] & taken[:, b]))
        pairs = [(a, b), (b, a)]
        chances = [weight[x] * weight[y] / (weight.sum() - weight[x]) for x, y in pairs]
        expected.append(sum(chances) / weight.sum())
    assert sum(counts) == images
    assert_counts_follow(counts, expected)
