import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from goldens_lib import FOLDER

from maskgil_jax import masking
from maskgil_jax.masking import DRAWS, FORMS, SCHEDULES

SEQ_LEN = 64


def released_schedules():
    with np.load(FOLDER / "schedules.npz") as stored:
        return {key: stored[key] for key in stored.files}


def test_increments_are_those_of_the_released_code():
    goldens = released_schedules()
    assert len(goldens) == 60
    for key, expected in goldens.items():
        schedule, num_steps, seq_len = key.split("_")
        table = masking.reveal_table(schedule, int(num_steps), int(seq_len))
        np.testing.assert_array_equal(table[int(seq_len)], expected, err_msg=key)


def test_mask_ratio_leaves_the_published_counts():
    table = masking.reveal_table("arccos", 8, 256, "mask_ratio")
    np.testing.assert_array_equal(table[256], [20, 21, 21, 23, 25, 28, 35, 83])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mask_ratio_follows_its_formula(schedule):
    for num_steps in (1, 2, 7, 8, 64):
        table = masking.reveal_table(schedule, num_steps, SEQ_LEN, "mask_ratio")
        for unknown in (0, 1, 5, 40, SEQ_LEN):
            expected = references.mask_ratio_counts(schedule, num_steps, unknown)
            np.testing.assert_array_equal(table[unknown], expected, f"T={num_steps} N={unknown}")


@pytest.mark.parametrize("num_steps", [7, 10, 60])
def test_mask_ratio_does_not_round_up_what_is_whole(num_steps):
    table = masking.reveal_table("linear", num_steps, 420, "mask_ratio")
    np.testing.assert_array_equal(table[420], 420 // num_steps)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_row_reveals_all_its_unknown_tokens(schedule, form):
    for num_steps in (1, 2, 3, 8, 33, SEQ_LEN):
        table = masking.reveal_table(schedule, num_steps, SEQ_LEN, form)
        assert table.dtype == np.int32
        assert table.shape == (SEQ_LEN + 1, num_steps)
        np.testing.assert_array_equal(table.sum(1), np.arange(SEQ_LEN + 1))
        assert table.min() >= 0
        if form == "increments":
            left = np.arange(SEQ_LEN + 1)[:, None] - np.cumsum(table, axis=1) + table
            assert np.all(table[left > 0] > 0), "a step reveals nothing though tokens are left"


def test_fewer_tokens_than_steps_are_revealed_one_by_one():
    np.testing.assert_array_equal(masking.reveal_table("arccos", 6, 8)[3], [1, 1, 1, 0, 0, 0])


def test_a_single_step_reveals_everything():
    for form in FORMS:
        np.testing.assert_array_equal(
            masking.reveal_table("cosine", 1, 9, form)[:, 0], np.arange(10)
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_curves_fall_from_one_to_zero_in_numpy_and_in_jax(schedule):
    r = np.linspace(0, 1, 11)
    expected = [references.CURVES[schedule](x) for x in r]
    in_numpy = masking.mask_rate(schedule, r)
    assert in_numpy.dtype == np.float64
    np.testing.assert_allclose(in_numpy, expected, atol=1e-15)
    assert in_numpy[0] == 1
    assert in_numpy[-1] == pytest.approx(0, abs=1e-15)
    assert np.all(np.diff(in_numpy) < 0)
    in_jax = jax.jit(lambda r: masking.mask_rate(schedule, r))(jnp.asarray(r))
    np.testing.assert_allclose(in_jax, expected, atol=1e-6)


@pytest.mark.parametrize("k", [0, 1, 3, 6])
def test_selection_is_exact_with_ties_and_takes_minus_infinity_last(k):
    scores = jnp.array(
        [
            [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
            [0.0, -0.0, 2.0, 2.0, -1.0, 2.0],
            [-jnp.inf, 5.0, -jnp.inf, 5.0, -1e30, -jnp.inf],
        ]
    )
    order = [[0, 1, 2, 3, 4, 5], [2, 3, 5, 0, 1, 4], [1, 3, 4, 0, 2, 5]]
    selected = np.asarray(jax.jit(masking.select_top_k)(scores, jnp.full(3, k)))
    for row, best in zip(selected, order, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), sorted(best[:k]))


def test_selection_counts_differ_by_row():
    scores = jax.random.normal(jax.random.key(0), (5, 7))
    counts = jnp.array([0, 7, 2, 5, 1])
    np.testing.assert_array_equal(masking.select_top_k(scores, counts).sum(1), counts)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_exact_masks_have_the_schedules_distribution_of_rates(schedule):
    mask = np.asarray(masking.draw_mask(jax.random.key(1), 4000, 16, schedule=schedule))
    counts = mask.sum(1)
    assert counts.min() >= 1
    # ⌈16·f(r)⌉ ≤ k means f(r) ≤ k/16; f falls, so its share is 1 - f⁻¹(k/16).
    grid = np.linspace(0, 1, 20001)
    curve = np.array([references.CURVES[schedule](r) for r in grid])
    for k in (1, 4, 8, 12):
        expected = np.mean(curve <= k / 16)
        assert np.mean(counts <= k) == pytest.approx(expected, abs=0.03)
    # Which positions are masked does not depend on where they are.
    np.testing.assert_allclose(mask.mean(0), mask.mean(), atol=0.04)


def test_bernoulli_masks_scatter_around_their_rate():
    masks = masking.draw_mask(jax.random.key(2), 4000, 16, schedule="linear", draw="bernoulli")
    counts = np.asarray(masks.sum(1))
    # With r uniform and a draw per token every count from 0 to 16 is equally likely.
    seen = collections.Counter(counts.tolist())
    assert set(seen) == set(range(17))
    chi_square = sum((seen[k] - 4000 / 17) ** 2 / (4000 / 17) for k in range(17))
    assert chi_square < 39.3  # 0.1 % of true draws exceed it at 16 degrees of freedom


@pytest.mark.parametrize("draw", DRAWS)
def test_masks_follow_their_key(draw):
    first, again, other = (
        np.asarray(masking.draw_mask(jax.random.key(seed), 8, 16, draw=draw)) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'arcos' is unknown.*Did you mean 'arccos'"):
        masking.reveal_table("arcos", 8, 64)
    with pytest.raises(ValueError, match=r"'maskratio' is unknown.*Did you mean 'mask_ratio'"):
        masking.reveal_table("arccos", 8, 64, "maskratio")
    with pytest.raises(ValueError, match=r"'exakt' is unknown.*Did you mean 'exact'"):
        masking.draw_mask(jax.random.key(0), 1, 4, draw="exakt")
    with pytest.raises(ValueError, match=r"'zzz' is unknown; allowed: root, .*, arccos\.$"):
        masking.mask_rate("zzz", 0.5)


@pytest.mark.parametrize("num_steps", [-1, 0, 65])
def test_step_counts_out_of_range_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps {num_steps} .* allowed: 1 to 64"):
        masking.reveal_table("arccos", num_steps, SEQ_LEN)
