import functools
import itertools
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import qmc
from toy_decoding import EVEN, assert_counts_follow, blank, decode, independent_model, log

from maskgil_jax.decoding import orders
from maskgil_jax.decoding.masked import SamplerConfig

MASK = 5
GRIDS = [(1, 1), (1, 2), (3, 5), (7, 4), (9, 9), (16, 16), (24, 16)]


def one_by_one(length, **changes):
    return SamplerConfig(num_steps=length, **EVEN | changes)


def uneven_model(length):
    """Confidence differs much between positions, and between the codes of one."""
    logits = np.random.default_rng(0).standard_normal((length, MASK))
    return independent_model(logits * np.linspace(0, 6, length)[:, None])


def reveal_ranks(history):
    """When each token was revealed, if one was in every step."""
    return np.sum(history == MASK, axis=0)


def mirror(n, base):
    digits = np.base_repr(n, base)
    return Fraction(int(digits[::-1], base), base ** len(digits))


@functools.cache
def exact_sequence(gh, gw):
    """Cells (row, column) in the order of their first visit, in exact arithmetic."""
    cells = {}
    for n in itertools.count(1):
        cells.setdefault((int(mirror(n, 2) * gh), int(mirror(n, 3) * gw)))
        if len(cells) == gh * gw:
            return tuple(cells)


def exact_ranks(gh, gw):
    ranks = np.empty((gh, gw), int)
    for rank, cell in enumerate(exact_sequence(gh, gw)):
        ranks[cell] = rank
    return ranks


def sequence_of(grid_size):
    cells = np.argsort(orders.halton_ranks(grid_size))
    return [divmod(int(cell), grid_size[1]) for cell in cells]


def test_halton_starts_as_published():
    first = [(8, 5), (4, 10), (12, 1), (2, 7), (10, 12), (6, 3), (14, 8), (1, 14)]
    assert sequence_of((16, 16))[:8] == first


@pytest.mark.parametrize("grid_size", GRIDS)
def test_halton_visits_every_cell_once_in_the_exact_order(grid_size):
    ranks = orders.halton_ranks(grid_size)
    np.testing.assert_array_equal(np.sort(ranks), np.arange(grid_size[0] * grid_size[1]))
    assert sequence_of(grid_size) == list(exact_sequence(*grid_size))


@pytest.mark.parametrize("grid_size", GRIDS)
def test_halton_agrees_with_scipy(grid_size):
    points = qmc.Halton(d=2, scramble=False).random(6001)[1:]
    # Where a point lies on a border between cells, SciPy's sums may fall short of it.
    rows, columns = np.floor(points * grid_size + 1e-9).astype(int).T
    cells, visits = np.unique(rows * grid_size[1] + columns, return_index=True)
    assert len(cells) == grid_size[0] * grid_size[1]
    expected = [divmod(int(cell), grid_size[1]) for cell in cells[np.argsort(visits)]]
    assert sequence_of(grid_size) == expected


@pytest.mark.parametrize("num_steps", [1, 4, 15])
def test_halton_reveals_the_first_cells_that_are_still_unknown(num_steps):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MASK, (5, 15))
    for row, unknown in zip(tokens, (15, 9, 2, 1, 0), strict=True):
        row[rng.permutation(15)[:unknown]] = MASK
    sampler = SamplerConfig(num_steps=num_steps, order="halton", guidance_scale=1.0)
    _, history = decode(uneven_model(15), tokens, sampler, mask=MASK, grid_size=(3, 5))
    path = [row * 5 + column for row, column in exact_sequence(3, 5)]
    for image, start in enumerate(tokens):
        waiting = [cell for cell in path if start[cell] == MASK]
        before = start
        for after in history[:, image]:
            changed = set(np.flatnonzero(after != before))
            assert changed == set(waiting[: len(changed)])
            waiting, before = waiting[len(changed) :], after
        assert not waiting


@functools.cache
def rolled(images, first=0):
    sampler = one_by_one(24, order="halton", halton_roll=True)
    tokens = blank(images, 24, MASK)
    _, history = decode(uneven_model(24), tokens, sampler, mask=MASK, grid_size=(4, 6), first=first)
    return reveal_ranks(history).reshape(-1, 4, 6)


def test_roll_shifts_the_sequence_of_every_image_around_the_grid():
    ranks, plain = rolled(1200), exact_ranks(4, 6)
    start = np.argwhere(plain == 0)[0]
    counts = np.zeros((4, 6))
    for image in ranks:
        shift = (np.argwhere(image == 0)[0] - start) % (4, 6)
        counts[tuple(shift)] += 1
        np.testing.assert_array_equal(image, np.roll(plain, shift, (0, 1)))
    assert_counts_follow(counts, np.full((4, 6), 1 / 24))


def test_roll_depends_on_the_key_of_the_image_alone():
    together = rolled(1200)
    np.testing.assert_array_equal(rolled(3, first=7), together[7:10])


@pytest.mark.parametrize("grid_size", [None, (4, 4), (15, 2)])
def test_halton_without_its_grid_is_refused(grid_size):
    sampler = SamplerConfig(num_steps=2, order="halton", guidance_scale=1.0)
    with pytest.raises(ValueError, match="needs the grid of the 15 tokens; grid_size is"):
        decode(uneven_model(15), blank(1, 15, MASK), sampler, mask=MASK, grid_size=grid_size)


def test_at_random_every_order_is_as_likely_whatever_the_confidence():
    tokens = blank(6000, 5, MASK)
    tokens[:, 2] = 1
    result, history = decode(uneven_model(5), tokens, one_by_one(5, order="random"), mask=MASK)
    assert np.all(result[:, 2] == 1)
    # Five steps for four tokens: one reveals nothing, the others one each.
    waited = np.sum(history == MASK, axis=0)[:, [0, 1, 3, 4]]
    found = np.argsort(waited, axis=1)
    permutations = list(itertools.permutations(range(4)))
    counts = [np.sum(np.all(found == p, axis=1)) for p in permutations]
    assert sum(counts) == 6000
    assert_counts_follow(counts, np.full(24, 1 / 24))


def test_at_random_the_order_has_nothing_to_do_with_the_codes():
    model = independent_model(log(np.full((2, MASK), 0.2)))
    tokens = blank(6000, 2, MASK)
    result, history = decode(model, tokens, one_by_one(2, order="random"), mask=MASK)
    late = history[0, :, 0] == MASK
    for images in (result[late], result[~late]):
        counts = np.zeros((MASK, MASK))
        np.add.at(counts, tuple(images.T), 1)
        assert_counts_follow(counts, np.full((MASK, MASK), 0.04))


def test_without_noise_the_most_probable_tokens_come_first():
    # Uniform over so many codes each: what is drawn does not matter for the confidence.
    choices = np.array([3, 1, 5, 2, 4])
    probabilities = (np.arange(MASK) < choices[:, None]) / choices[:, None]
    model = independent_model(log(probabilities))
    _, history = decode(model, blank(50, 5, MASK), one_by_one(5), mask=MASK)
    np.testing.assert_array_equal(reveal_ranks(history), np.tile(choices - 1, (50, 1)))


def test_confidence_is_that_of_the_drawn_code():
    probabilities = np.array([[0.4, 0.35, 0.15, 0.06, 0.04], [0.5, 0.3, 0.12, 0.05, 0.03]])
    model = independent_model(log(probabilities))
    _, history = decode(model, blank(2000, 2, MASK), one_by_one(2), mask=MASK)
    first = history[0]
    position = np.argmax(first != MASK, axis=1)
    code = np.take_along_axis(first, position[:, None], 1)[:, 0]
    counts = np.zeros((2, MASK))
    np.add.at(counts, (position, code), 1)
    # The revealed of two draws is the more probable one.
    expected = np.zeros((2, MASK))
    for a, b in itertools.product(range(MASK), repeat=2):
        pair = probabilities[0, a], probabilities[1, b]
        winner = int(pair[1] > pair[0])
        expected[winner, (a, b)[winner]] += pair[0] * pair[1]
    rare = expected * 2000 < 5
    pooled = [*counts[~rare], counts[rare].sum()], [*expected[~rare], expected[rare].sum()]
    assert_counts_follow(*pooled)
