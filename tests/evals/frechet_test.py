import tracemalloc

import numpy as np
import pytest
import scipy.linalg
from goldens_lib import load_golden

from maskgil_jax.evals import frechet
from maskgil_jax.evals.frechet import (
    Statistics,
    describe_bias,
    frechet_distance,
    load_statistics,
    save_statistics,
)

of_features = Statistics.of_features


def draw(count, width=6, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) + offset


def make(mean, covariance, count=None):
    return Statistics(
        mean=np.asarray(mean, np.float64),
        covariance=np.asarray(covariance, np.float64),
        count=count,
    )


def same(one, other, rtol=1e-12):
    np.testing.assert_allclose(one.mean, other.mean, rtol=rtol)
    np.testing.assert_allclose(
        one.covariance, other.covariance, atol=rtol * np.abs(other.covariance).max()
    )
    assert one.count == other.count


def test_statistics_are_those_of_numpy_whatever_the_blocks(monkeypatch):
    monkeypatch.setattr(frechet, "BLOCK_ROWS", 16)
    features = draw(101).astype(np.float32)
    whole = of_features(features)
    exact = features.astype(np.float64)
    np.testing.assert_allclose(whole.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(exact, rowvar=False), rtol=1e-12)
    assert whole.count == 101
    for sizes in ([1] * 101, [16] * 6 + [5], [90, 11], [3, 0, 98]):
        parts = [part for part in np.split(features, np.cumsum(sizes)[:-1]) if len(part)]
        found = Statistics.of_blocks(iter(parts))
        # To the bit: rows are regrouped.
        np.testing.assert_array_equal(found.mean, whole.mean)
        np.testing.assert_array_equal(found.covariance, whole.covariance)


def test_merged_parts_are_the_whole_in_any_order():
    features = draw(50)
    whole = of_features(features)
    parts = [of_features(part) for part in np.split(features, [1, 2, 30])]
    for order in ([0, 1, 2, 3], [3, 0, 2, 1]):
        first, *others = (parts[i] for i in order)
        for other in others:
            first = first.merge(other)
        same(first, whole)


def test_nothing_cancels_far_from_the_origin():
    features = np.random.default_rng(0).standard_normal((20_000, 3))
    far = of_features(features + 1e8)
    np.testing.assert_allclose(far.covariance, np.cov(features, rowvar=False), atol=1e-7, rtol=0)


def test_a_stream_takes_bounded_memory():
    rng = np.random.default_rng(0)
    blocks = (rng.standard_normal((1000, 64), dtype=np.float32) for _ in range(60))
    tracemalloc.start()
    try:
        found = Statistics.of_blocks(blocks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.count == 60_000
    assert peak < 3 * frechet.BLOCK_ROWS * 64 * 8 < 60_000 * 64 * 4


def test_the_golden_distances():
    golden = load_golden("metric_features").arrays
    one, other, near = (of_features(golden[key]) for key in ("a", "b", "a_near"))
    assert frechet_distance(one, other) == pytest.approx(39.96299676342886, rel=1e-7)
    assert frechet_distance(other, one) == pytest.approx(39.96299676342886, rel=1e-7)
    assert frechet_distance(one, near) == pytest.approx(0.01186126322409109, rel=1e-6)


def test_the_distance_is_that_of_the_schur_form():
    one, other = of_features(draw(200, offset=1.0)), of_features(draw(300, seed=1))
    root = scipy.linalg.sqrtm(one.covariance @ other.covariance).real
    expected = np.sum((one.mean - other.mean) ** 2)
    expected += np.trace(one.covariance + other.covariance - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)


def test_closed_forms():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    a, b = np.array([4.0, 1, 9, 0.25]), np.array([1.0, 1, 4, 0])
    # Covariances with common axes: the squared differences of means and of standard deviations.
    one, other = (make(mean, turn * v @ turn.T) for mean, v in ((np.zeros(4), a), (np.ones(4), b)))
    expected = 4 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)
    # One dimension.
    assert frechet_distance(make([3], [[4]]), make([1], [[9]])) == pytest.approx(5)


def test_covariances_without_full_rank():
    rng = np.random.default_rng(0)
    flat = rng.standard_normal((50, 2)) @ rng.standard_normal((2, 5))
    expected = 4 * (np.trace(np.cov(flat, rowvar=False)) + np.sum(flat.mean(0) ** 2))
    found = frechet_distance(of_features(flat), of_features(3 * flat))
    assert found == pytest.approx(expected, rel=1e-6)
    constant = of_features(np.ones((4, 5)))
    assert frechet_distance(constant, of_features(np.full((3, 5), 3.0))) == pytest.approx(20)
    # Two images, the fewest: rank 1.
    assert frechet_distance(of_features(draw(2)), of_features(draw(9, seed=1))) > 0


def test_too_few_rows_are_told_with_their_count():
    few, enough = of_features(draw(6)), of_features(draw(7))
    assert describe_bias({"generated": enough, "real": make(np.zeros(6), np.eye(6))}) == []
    (note,) = describe_bias({"generated": few, "real": enough})
    assert note.startswith("generated: 6 images are too few for a covariance of 6 features")
    with pytest.raises(ValueError, match="1 row have no covariance; give at least 2 images"):
        frechet_distance(enough, of_features(draw(1)))


def test_files_come_back_to_the_bit(tmp_path):
    pool, spatial = of_features(draw(30)), of_features(draw(30, width=3))
    path = tmp_path / "deep" / "stats.npz"
    save_statistics(path, pool, spatial)
    for saved, loaded in zip((pool, spatial), load_statistics(path), strict=True):
        np.testing.assert_array_equal(saved.mean, loaded.mean)
        np.testing.assert_array_equal(saved.covariance, loaded.covariance)
        assert loaded.count == 30
    with np.load(path) as stored:
        assert set(stored.files) == {"mu", "sigma", "mu_s", "sigma_s", "count"}
    assert [file.name for file in path.parent.iterdir()] == ["stats.npz"]


def test_files_of_others_are_read(tmp_path):
    pool = of_features(draw(30))
    pair = {"mu": pool.mean, "sigma": pool.covariance}
    np.savez(tmp_path / "pytorch_fid.npz", **pair)
    loaded, spatial = load_statistics(tmp_path / "pytorch_fid.npz")
    assert (loaded.count, spatial) == (None, None)
    assert frechet_distance(loaded, pool) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="without a count cannot be merged"):
        loaded.merge(pool)
    narrow = {"mu_s": np.zeros(2, np.float32), "sigma_s": np.eye(2, dtype=np.float32)}
    images = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}
    np.savez_compressed(tmp_path / "adm.npz", **pair, **narrow, **images)
    _, spatial = load_statistics(tmp_path / "adm.npz")
    assert spatial.covariance.dtype == np.float64
    assert spatial.width == 2


def test_files_that_hold_no_statistics_are_refused(tmp_path):
    path = tmp_path / "stats.npz"
    mu, sigma = np.zeros(3), np.eye(3)
    for arrays, message in (
        ({"arr_0": mu}, "holds arr_0 and lacks mu, sigma"),
        ({"mu": mu}, "holds mu and lacks sigma"),
        ({"mu": mu, "sigma": sigma, "mu_s": mu}, "lacks sigma_s"),
        ({"mu": mu, "sigma": np.eye(4)}, r"shape \(3,\) and covariance of shape \(4, 4\)"),
        ({"mu": mu.astype(int), "sigma": sigma}, "mean is int64"),
        ({"mu": mu * np.nan, "sigma": sigma}, "stats.npz: statistics hold NaN"),
        ({"mu": mu, "sigma": np.tri(3)}, "not symmetric"),
        ({"mu": mu, "sigma": -sigma}, "negative variance"),
        ({"mu": mu, "sigma": sigma, "count": 0}, "count 0"),
        ({"mu": np.array([None]), "sigma": sigma}, "cannot be read"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            load_statistics(path)
    for content in (b"", b"PK\x03\x04nonsense", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as an .npz"):
            load_statistics(path)
    np.save(tmp_path / "one.npy", mu)
    with pytest.raises(ValueError, match="it is a single array"):
        load_statistics(tmp_path / "one.npy")
    with pytest.raises(FileNotFoundError):
        load_statistics(tmp_path / "none.npz")


def test_what_cannot_be_saved_leaves_what_was_there(tmp_path, monkeypatch):
    pool = of_features(draw(30))
    with pytest.raises(ValueError, match="does not end in .npz"):
        save_statistics(tmp_path / "stats.json", pool)
    with pytest.raises(ValueError, match="spatial features of 29 images, pooled ones of 30"):
        save_statistics(tmp_path / "stats.npz", pool, of_features(draw(29)))
    assert not list(tmp_path.iterdir())
    save_statistics(tmp_path / "stats.npz", pool)

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        save_statistics(tmp_path / "stats.npz", of_features(draw(40)))
    assert [file.name for file in tmp_path.iterdir()] == ["stats.npz"]
    assert load_statistics(tmp_path / "stats.npz")[0].count == 30


def test_features_that_cannot_be_measured_are_named():
    good = np.zeros((3, 2))
    for blocks, message in (
        ([], "no features"),
        ([good[0]], r"shape \(2,\)"),
        ([good[:0]], "non-empty"),
        ([good.astype(complex)], "dtype complex128"),
        ([good.astype(bool)], "dtype bool"),
        ([good, good[:, :1]], "a block has 1 features per row, the first block 2"),
        ([good, good + np.inf], "NaN or infinity in 3 of 3 rows, first in row 3"),
    ):
        with pytest.raises(ValueError, match=message):
            Statistics.of_blocks(blocks)
    with pytest.raises(ValueError, match="the other 3"):
        frechet_distance(of_features(draw(4, width=2)), of_features(draw(4, width=3)))
