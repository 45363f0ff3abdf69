import math

import numpy as np
import pytest
from goldens_lib import load_golden

from maskgil_jax.evals.scores import inception_score, kernel_distance


def softmax(logits):
    shares = np.exp(logits.astype(np.float64))
    return shares / shares.sum(axis=1, keepdims=True)


def slow_kid(x, y):
    """The U-statistic as a sum over pairs."""
    m, d = x.shape

    def k(a, b):
        return (float(np.dot(a, b)) / d + 1) ** 3

    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(m) for j in range(m) if i != j)
    return within / (m * (m - 1)) - 2 / m**2 * sum(k(a, b) for a in x for b in y)


def test_the_golden_inception_score():
    score = inception_score(load_golden("metric_features").arrays["logits"], split_size=50)
    assert score.mean == pytest.approx(4.619621332394192, rel=1e-9)
    assert score.std == pytest.approx(0.4014912089685954, rel=1e-9)


def test_the_score_is_the_exponential_of_mutual_information():
    logits = np.random.default_rng(0).standard_normal((23, 5)) * 3
    values = []
    for part in (logits[:10], logits[10:20], logits[20:]):  # the last split is shorter
        p = softmax(part)
        entropy = -(p.mean(0) * np.log(p.mean(0))).sum()
        values.append(math.exp(entropy + (p * np.log(p)).sum(axis=1).mean()))
    score = inception_score(logits.astype(np.float32), split_size=10)
    assert score.mean == pytest.approx(np.mean(values), rel=1e-6)
    assert score.std == pytest.approx(np.std(values), rel=1e-5)


def test_one_part_has_no_spread():
    logits = np.random.default_rng(0).standard_normal((20, 5))
    assert math.isnan(inception_score(logits).std)
    assert math.isnan(kernel_distance(logits, logits, subset_size=9, subsets=1).std)
    assert inception_score(logits, split_size=10).std > 0


def test_known_scores():
    certain = np.eye(8) * 1000.0  # underflows anything but logarithms
    assert inception_score(np.tile(certain, (4, 1))).mean == pytest.approx(8)
    assert inception_score(np.tile(certain, (4, 1)), split_size=4).mean == pytest.approx(4)
    assert inception_score(np.zeros((9, 8))).mean == pytest.approx(1)
    shifted = np.random.default_rng(0).standard_normal((9, 8)) + 1e4
    assert inception_score(shifted).mean == pytest.approx(inception_score(shifted - 1e4).mean)


def test_kid_is_its_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 5)), rng.standard_normal((12, 5)) + 0.7
    # Subsets of all rows: the draw is then a permutation, and every subset gives the same.
    score = kernel_distance(x, y, subset_size=12, subsets=3)
    assert score.mean == pytest.approx(slow_kid(x, y), rel=1e-12)
    assert score.std == pytest.approx(0, abs=1e-12)


def test_subsets_are_drawn_as_torch_fidelity_draws_them():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((20, 4)) + 1
    draw = np.random.RandomState(2020)
    values = []
    for _ in range(5):
        of_x = draw.choice(30, 7, replace=False)
        values.append(slow_kid(x[of_x], y[draw.choice(20, 7, replace=False)]))
    score = kernel_distance(x, y, subset_size=7, subsets=5)
    assert score.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert score.std == pytest.approx(np.std(values), rel=1e-12)
    assert kernel_distance(x, y, subset_size=7, subsets=5, seed=1).mean != score.mean


def test_kid_of_equal_distributions_is_about_zero_and_unbiased():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 2000, 8))
    equal = kernel_distance(x, y, subset_size=100, subsets=200)
    assert abs(equal.mean) < 3 * equal.std / math.sqrt(20)  # 20 disjoint subsets
    assert kernel_distance(x, y + 0.5, subset_size=100).mean > 20 * abs(equal.mean)
    # E k(x, x') = 1 + 3·E(x·x')²/d² = 1 + 3/d for Gaussians about 0; with means ±s along one
    # axis the cross term alone changes: the closed form of a shift.
    s, d = 1.0, 8
    shift = np.zeros(d)
    shift[0] = s
    # x·y ~ mean s², variance d + 2s² within the shifted set; mean 0, variance d + s² across.
    within = 1 + 3 * s**2 / d + 3 * (d + 2 * s**2 + s**4) / d**2 + third_moment(s, d) / d**3
    across = 1 + 3 * (d + s**2) / d**2
    expected = (1 + 3 / d) + within - 2 * across
    found = kernel_distance(x, y + shift, subset_size=500, subsets=50).mean
    assert found == pytest.approx(expected, rel=0.15)


def third_moment(s, d):
    """E (x·y)³ of two independent unit Gaussians in d dimensions, both of mean (s, 0, 0, …)."""
    # First axis: E a³ = s³ + 3s for a of mean s; other axes: d - 1 products of mean 0, variance 1.
    return (s**3 + 3 * s) ** 2 + 3 * s**2 * (d - 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: inception_score(x[:1]), "at least 2"),
        (lambda x: inception_score(x, split_size=1), "split_size 1"),
        (lambda x: inception_score(x * np.nan), "logits holds NaN"),
        (lambda x: inception_score(x[0]), r"logits has shape \(3,\)"),
        (lambda x: kernel_distance(x, x), "4 generated and 4 real .* subsets of 1000"),
        (lambda x: kernel_distance(x, x[:, :2], subset_size=4), "generated has 3 .*, real 2"),
        (lambda x: kernel_distance(x, x, subset_size=1), "subset_size 1"),
        (lambda x: kernel_distance(x, x, subset_size=4, subsets=0), "subsets 0"),
        (lambda x: kernel_distance(x, x.astype(str), subset_size=4), "real has .* dtype <U"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((4, 3)))
